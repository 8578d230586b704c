"""Test doubles of a team, and the conformance suite of systems: `check_system(MySystem([...]),
tasks)` plays a system with fake answers and raises at what would break training.

What training relies on, whatever the interaction: the same seed gives the same turns, however long
answers take; recorded turns, given back, give the same episode; `reads` names exactly the turns
whose text an agent was shown; no prompt holds the gold answer; the settings can be saved and built
again. No model, no clock: delays are turns of the event loop.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from .chat import Services
from .execution import Check, Execute
from .system import System
from .team import Team
from .transcript import Call, Operation, Transcript
from .types import AgentSpec, Completion, Decision, Message, Task, Turn, from_json, to_json

Answer = Callable[[str, "tuple[Message, ...]", str], str]

GOLD, HIDDEN = "gold-5309144207", "hidden-8675301932"  # stand in no task


def number_alone(agent: str, messages: tuple[Message, ...], marker: str) -> str:
    """The usual fake answer: its marker, a number of ten digits that no other answer of the episode
    has."""
    return marker


@dataclass
class Fake:
    """Completions from a function `(agent name, messages) -> text`: a whole system runs in a test
    without any model. `calls` are those answered so far."""

    answer: Callable[[str, tuple[Message, ...]], str]
    calls: list[Call] = field(default_factory=list)

    async def __call__(self, call: Call) -> list[Completion]:
        self.calls.append(call)
        await asyncio.sleep(0)
        return [
            Completion(self.answer(call.agent.name, call.messages), policy=call.agent.policy)
            for _ in range(call.n)
        ]


def fake_team(
    agents: Sequence[str | AgentSpec],
    answer: Callable[[str, tuple[Message, ...]], str],
    values: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Team:
    """A team that answers by a function. `await system.run(task, fake_team(["a", "b"], lambda
    agent, messages: "4"))`.

    `settings`: fields of `Services` and arguments of `Transcript` by name.
    """
    specs = [a if isinstance(a, AgentSpec) else AgentSpec(a) for a in agents]
    names = {f.name for f in fields(Services)}
    services = {name: value for name, value in settings.items() if name in names}
    recorded = {name: value for name, value in settings.items() if name not in names}
    return Team(specs, Services(Fake(answer), **services), Transcript(**recorded), values)


class _Programs(NamedTuple):
    """What runs and what tests the programs of a system under check."""

    execute: Execute | None = None
    check: Check | None = None


@dataclass(frozen=True)
class Played:
    """One episode of a check, and what was asked for while it was played."""

    output: Any
    turns: tuple[Turn, ...]
    decisions: tuple[Decision, ...]
    operations: tuple[Operation, ...]
    asked: int  # completions given live
    markers: dict[str, tuple[int, int]] = field(
        compare=False, default_factory=dict
    )  # marker -> (index, sibling)

    @property
    def facts(self) -> Any:
        return to_json((self.output, self.turns, self.decisions, self.operations))


def check_system(
    system: System,
    tasks: Sequence[Task],
    answer: Answer = number_alone,
    seeds: Iterable[int] = (0, 1),
    execute: Execute | None = None,
    check: Check | None = None,
) -> None:
    """Check a system on tasks. Raises `AssertionError` saying what does not hold, for which task
    and turn.

    `answer(agent name, messages, marker) -> text` plays the agents; it must depend on its arguments
    alone and put `marker` into its text (a judge may say `f"{marker} Verdict: wrong"`). `execute`
    and `check`: what runs programs and what tests them, for a system that has some run
    (`rollouts.sandbox.run` and `.check`). From inside an event loop, await `check` instead.
    """
    asyncio.run(_check_all(system, tasks, answer, seeds, _Programs(execute, check)))


async def check(
    system: System,
    tasks: Sequence[Task],
    answer: Answer = number_alone,
    seeds: Iterable[int] = (0, 1),
    execute: Execute | None = None,
    check: Check | None = None,
) -> None:
    """See `check_system`."""
    await _check_all(system, tasks, answer, seeds, _Programs(execute, check))


async def _check_all(
    system: System, tasks: Sequence[Task], answer: Answer, seeds: Iterable[int], programs: _Programs
) -> None:
    _require(bool(tasks), "tasks: expected at least one task to play")
    for task in tasks:
        for seed in seeds:
            await _check_one(system, task, answer, seed, programs)


async def _check_one(
    system: System, task: Task, answer: Answer, seed: int, programs: _Programs
) -> None:
    where = f"{type(system).__name__} on task {task.id!r}, seed {seed}"
    play = functools.partial(_play, task=task, answer=answer, seed=seed, programs=programs)
    first = await play(system)
    _require(first.turns != (), f"{where}: no agent was asked anything")
    for delays in (1, 2, 3):
        again = await play(system, delays=delays)
        _same(
            first,
            again,
            f"{where}: the same seed gave another episode when answers took longer or shorter",
        )
    rebuilt = type(system)(agents=system.agents, **json.loads(json.dumps(system.arguments())))
    _same(first, await play(rebuilt), f"{where}: rebuilt from arguments() it plays another episode")
    _require(
        len(first.turns) == first.asked,
        f"{where}: {first.asked} answers were sampled, {len(first.turns)} turns recorded",
    )
    _require(any(t.taken for t in first.turns), f"{where}: no turn is marked as taken")
    await _check_replay(functools.partial(play, system), first, where)
    for turn in first.turns:
        _check_reads(turn, first, where)
    _check_gold(first, gold_of(task), where)


async def _check_replay(play: Callable[..., Awaitable[Played]], first: Played, where: str) -> None:
    """All turns given, and half of them with the rest live, must reproduce the episode. Turns go
    through JSON as in a store."""
    turns = [from_json(Turn, json.loads(json.dumps(to_json(turn)))) for turn in first.turns]
    all_given = await play(given=turns, decisions=first.decisions)
    _require(
        all_given.asked == 0,
        f"{where}: with all turns given it still asked for {all_given.asked} answers",
    )
    _same(first, all_given, f"{where}: replaying all turns gave another episode")
    middle = max(turn.index for turn in turns) // 2 + 1
    half = [turn for turn in turns if turn.index < middle]
    half_given = await play(given=half, delays=4)
    _same(
        first,
        half_given,
        f"{where}: with turns below {middle} given and the rest live, it gave another episode",
    )


def _check_reads(turn: Turn, played: Played, where: str) -> None:
    # What the agent said itself stands in its chat as the assistant's; everything else it was
    # shown, or took over with a chat.
    own = {each.index for each in played.turns if each.agent == turn.agent}
    assistant, others = (
        "\n".join(m.content for m in turn.messages if (m.role == "assistant") is mine)
        for mine in (True, False)
    )
    stands = {
        index
        for marker, (index, _) in played.markers.items()
        if marker in others or (marker in assistant and index not in own)
    }
    text = f"{assistant}\n{others}"
    through = {o.index: set(o.reads) for o in played.operations if o.index in turn.reads}
    shown = {o.index for o in played.operations if o.text in text}
    for index in sorted(stands - set(turn.reads).union(*through.values())):
        _require(
            False,
            f"{where}: turn {turn.index} ({turn.agent}) is shown the text of turn {index};"
            " reply(..., reads=...) lacks it",
        )
    for index in sorted(set(turn.reads) - stands - shown):
        _require(
            False,
            f"{where}: turn {turn.index} ({turn.agent}) says it reads turn {index}, whose text it"
            " is not shown",
        )


def gold_of(task: Task) -> list[str]:
    """Texts that no agent may be shown: answer and private meta, unless so short, or so public,
    that they prove nothing."""
    public = task.public()
    known = f"{public.id}\n{public.prompt}\n{public.meta}"
    private = [task.answer, *(value for key, value in task.meta.items() if key not in public.meta)]
    return [
        GOLD,
        HIDDEN,
        *(str(value) for value in private if len(str(value)) >= 6 and str(value) not in known),
    ]


def _check_gold(played: Played, gold: Sequence[str], where: str) -> None:
    for turn in played.turns:
        seen = "\n".join(message.content for message in turn.messages)
        if not turn.saw_gold and any(each in seen for each in gold):
            _require(
                False,
                f"{where}: turn {turn.index} ({turn.agent}) is shown the answer or private meta"
                " without saw_gold=True",
            )
    _require(
        not any(each in str(played.output) for each in gold),
        f"{where}: the output holds the answer or private meta",
    )


async def _play(
    system: System,
    task: Task,
    answer: Answer,
    seed: int,
    *,
    delays: int = 0,
    given: Iterable[Turn] = (),
    decisions: Iterable[Decision] = (),
    programs: _Programs,
) -> Played:
    """Play one episode. `delays`: how long answers take. 0: all equally long; 1: later ones are
    sooner there; else a seed."""
    given = list(given)
    markers = {
        _marker(turn.sampling.seed, turn.index, turn.sibling): (turn.index, turn.sibling)
        for turn in given
    }
    wait = random.Random(delays)
    asked = 0

    async def ask(call: Call) -> list[Completion]:
        nonlocal asked
        asked += call.n
        for _ in range(
            1 if not delays else max(1, 40 - call.index) if delays == 1 else wait.randrange(40)
        ):
            await asyncio.sleep(0)
        completions = []
        for sibling in range(call.n):
            marker = _marker(call.sampling.seed, call.index, sibling)
            text = answer(call.agent.name, call.messages, marker)
            _require(
                marker in text,
                f"answer({call.agent.name!r}, ...): expected a text that holds the marker {marker},"
                f" got {text!r}",
            )
            markers[marker] = (call.index, sibling)
            completions.append(Completion(text, policy=call.agent.policy))
        return completions

    secret = replace(task, answer=GOLD, meta={**task.meta, "_hidden": HIDDEN})

    async def play_children(child: System, tasks: Sequence[Task]) -> list[Any]:
        for each in tasks:
            _require(
                GOLD not in str(to_json(each)),
                f"{type(system).__name__}: a child's task holds the gold answer",
            )
        return [
            (await _play(child, each, answer, seed, programs=programs)).output for each in tasks
        ]

    services = Services(ask, play_children, programs.execute, programs.check)
    team = Team(system.specs, services, Transcript(seed, given=given, decisions=decisions))
    output = await system.run(secret.public(), team)
    operations = tuple(team.operations)
    return Played(output, team.turns, tuple(team.decisions), operations, asked, markers)


def _marker(seed: int | None, index: int, sibling: int) -> str:
    return f"{10_000 + (seed or 0) % 90_000}{index:03d}{sibling:02d}"


def _same(first: Played, second: Played, problem: str) -> None:
    if first.facts == second.facts:
        return
    for one, other in zip(first.turns, second.turns, strict=False):
        if one != other:
            _require(
                False,
                f"{problem}; first at turn {one.index}: {one.agent} then {other.agent},"
                f" {one.text!r} then {other.text!r}",
            )
    _require(
        False,
        f"{problem}: {len(first.turns)} then {len(second.turns)} turns, output {first.output!r}"
        f" then {second.output!r}",
    )


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise AssertionError(problem)
