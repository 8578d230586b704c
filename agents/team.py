"""A team at work: agents that hold their chats, the order of their turns, and the base class of
every system.

A system is a coroutine. Whoever plays it hands it a `Team`; the team numbers each call before
anything is awaited, asks `ask` for the completion (an engine in training, a function in tests), and
keeps every turn. Replaying is the same thing with recorded completions for the first calls.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from .execution import (
    Check,
    Execute,
    ExecutionResult,
    Externals,
    Limits,
    SandboxError,
    TestResult,
    TestSuite,
)
from .seeds import derive_seed
from .tools.tools import Tool, parse_calls, python_tool, resolve_tools, run_call, tool_prompt
from .types import (
    AgentSpec,
    Ask,
    Call,
    Choose,
    Completion,
    Decision,
    LimitError,
    Message,
    ReplayError,
    Sampling,
    SettingError,
    Task,
    Turn,
    from_json,
    nearest,
    to_json,
)

T = TypeVar("T")


def _agent(given: Any) -> AgentSpec:
    if isinstance(given, AgentSpec):
        return given
    return AgentSpec(given) if isinstance(given, str) else from_json(AgentSpec, given, "agents")


@dataclass
class System:
    """Base of every interaction pattern: a dataclass of its settings, with one coroutine `run(task,
    team) -> output`.

    `agents` takes names, `AgentSpec`s or mappings of their fields. Settings are JSON values, so a
    checkpoint can hold class and arguments.
    """

    agents: Sequence[str | AgentSpec] = ()

    def __post_init__(self) -> None:
        if not self.agents:
            raise SettingError(
                f"{type(self).__name__}(agents=...): expected at least one agent name"
            )
        if isinstance(self.agents, (str, AgentSpec)):
            raise SettingError(
                f"{type(self).__name__}(agents={self.agents!r}): expected a list of agents, got one"
            )
        self.agents = tuple(_agent(a) for a in self.agents)
        names = [agent.name for agent in self.specs]
        for name in names:
            if names.count(name) > 1:
                raise SettingError(
                    f"agents: two agents are named {name!r}; names are unique, only policies may be"
                    " shared"
                )

    @property
    def specs(self) -> tuple[AgentSpec, ...]:
        return self.agents  # type: ignore[return-value]

    def with_agents(self, agents: Sequence[AgentSpec]) -> System:
        return replace(self, agents=tuple(agents))

    def arguments(self) -> dict[str, Any]:
        """The settings besides the agents, as JSON: `type(system)(agents=...,
        **system.arguments())` rebuilds it."""
        return {f.name: to_json(getattr(self, f.name)) for f in fields(self) if f.name != "agents"}

    async def run(self, task: Task, team: Team) -> str:
        raise TypeError(
            f"{type(self).__name__} has no run(task, team); write it as a coroutine that returns"
            " the output"
        )


class Agent:
    """A seat in a running episode. Its chat grows by appending; `fresh()` opens a second, empty
    one."""

    def __init__(self, team: Team, spec: AgentSpec) -> None:
        self.team, self.spec = team, spec
        self.chat: tuple[Message, ...] = ()
        self._last: Turn | None = None
        self._opening = 0  # messages of the chat that stood there before anything was said
        self._read: set[int] = set()  # turns shown in this chat so far
        self._said: set[int] = set()  # its own turns in this chat
        self._saw_gold = False  # in this chat so far
        self._busy = False

    @property
    def name(self) -> str:
        return self.spec.name

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, {len(self.chat)} messages)"

    def fresh(self) -> Agent:
        """The same agent with an empty chat."""
        return Agent(self.team, self.spec)

    def take_over(self, other: Agent) -> Agent:
        """A chat in which this agent goes on where `other` stands: what was said there, under this
        agent's own opening.

        The other's replies stand as the assistant's, but only what this agent adds is its own (a
        critic that goes on for a generator, a policy per round). Its turns' `reads` hold the
        other's turns.
        """
        if other._busy:
            raise SettingError(
                f"agent {other.name!r} is still answering in the chat that {self.name!r} would take"
                " over; await it"
            )
        made = self.fresh()
        made._open()
        made.chat += other.chat[other._opening :]
        made._read, made._saw_gold = other._read | other._said, other._saw_gold
        return made

    def _open(self) -> None:
        self.chat = self.team.opening(self.spec, self.team.tools_of(self.spec))
        self._opening = len(self.chat)

    def reply(
        self,
        text: str,
        *,
        reads: Sequence[Turn] = (),
        n: int = 1,
        choose: Choose | None = None,
        saw_gold: bool = False,
        sampling: Sampling | None = None,
        index: int | None = None,
    ) -> Awaitable[Turn]:
        """Say `text` to the agent and await its answer. The turn's index is taken now, before
        anything is awaited.

        Args:
            reads: the turns whose text stands in `text`; required wherever agents read one another.
                The turn's own `reads` are these and those of the chat's earlier calls, whose
                messages it holds too.
            n, choose: sample n siblings in one request; `choose(turns) -> number` picks the one the
                chat goes on with (the first if None). All siblings are recorded.
            saw_gold: `text` tells the answer; neither this turn nor a later one of this chat will
                be trained on.
            sampling: overrides the agent's for this call.
            index: one that `team.reserve` gave before, for a call whose number must not depend on
                when it comes.
        """
        if n < 1:
            raise SettingError(f"agent {self.name!r}: reply(n={n}), expected n >= 1")
        if self._busy:
            raise SettingError(
                f"agent {self.name!r} is still answering in this chat; await it, or use"
                " agent.fresh()"
            )
        tools = self.team.tools_of(self.spec)
        if not self.chat:
            self._open()
        index = (
            self.team.reserve(1 + (self.team.max_tool_calls if tools else 0))
            if index is None
            else index
        )
        self._busy = True
        return self._answer(
            index,
            tools,
            Message("user", text),
            {t.index for t in reads},
            n,
            choose,
            saw_gold,
            sampling,
        )

    def answer(
        self,
        messages: Sequence[Message],
        previous: Turn | None = None,
        *,
        reads: Sequence[int] = (),
        n: int = 1,
        sampling: Sampling | None = None,
    ) -> Awaitable[Turn]:
        """Answer a whole list of messages, as programs send that keep their chats themselves; the
        agent's own chat is not touched.

        No prompt or demonstration of the agent's is added and no tool is run. The turn's index is
        taken now.

        Args:
            previous: the turn this list goes on from: it begins with that turn's messages and its
                text as the assistant's.
            reads: indices of the turns whose text stands in `messages`.
        """
        if n < 1:
            raise SettingError(f"agent {self.name!r}: answer(n={n}), expected n >= 1")
        index = self.team.reserve(1)
        chosen = self.team.sampling_of(self.spec, index, sampling)
        return self.team.take(
            Call(index, self.spec, tuple(messages), chosen, n, previous),
            tuple(sorted(reads)),
            None,
            False,
        )

    async def _answer(
        self,
        index: int,
        tools: Mapping[str, Tool],
        said: Message,
        reads: set[int],
        n: int,
        choose: Choose | None,
        saw_gold: bool,
        sampling: Sampling | None,
    ) -> Turn:
        try:
            for left in range(self.team.max_tool_calls if tools else 0, -1, -1):
                # The chat grows once the answer is there: after a failed call (a prompt too long)
                # it is as it was before.
                messages, read, gold = (
                    self.chat + (said,),
                    self._read | reads,
                    self._saw_gold or saw_gold,
                )
                call = Call(
                    index,
                    self.spec,
                    messages,
                    self.team.sampling_of(self.spec, index, sampling),
                    n,
                    self._last,
                )
                turn = await self.team.take(call, tuple(sorted(read)), choose, gold)
                self.chat, self._read, self._saw_gold = (
                    messages + (Message("assistant", turn.text),),
                    read,
                    gold,
                )
                self._last = turn
                self._said.add(turn.index)
                calls = parse_calls(turn.text) if tools and left else []
                if not calls:
                    break
                results = [await self.team.tool(request, tools) for request in calls]
                said, index = Message("user", "\n".join(results)), index + 1
            return turn
        finally:
            self._busy = False


class Team:
    """The agents of one episode, in the order of their specs, and all they do.

    Args:
        agents: the seats. `ask`: gives completions for a `Call`.
        seed: the episode's; every request's seed, `rng` and decisions follow from it.
        values: texts and choices by name that a method may change (`NAME.prompt`, `NAME.demos`, a
            decision's logits).
        given: recorded turns that answer the first calls. `replace`: completions by turn index that
            answer instead.
        max_turns: bound on turn indices; a reply of an agent with tools takes 1 + `max_tool_calls`
            of them, used or not.
        play: plays a child episode, for `team.play`. execute: runs programs, for `team.execute` and
            the tool `python`. check: tests them.
    """

    def __init__(
        self,
        agents: Sequence[AgentSpec],
        ask: Ask,
        *,
        seed: int = 0,
        values: Mapping[str, Any] | None = None,
        sampling: Sampling | None = None,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        max_turns: int = 200,
        max_tool_calls: int = 4,
        play: Callable[[System, Sequence[Task]], Awaitable[list[Any]]] | None = None,
        execute: Execute | None = None,
        check: Check | None = None,
    ) -> None:
        self._agents = {spec.name: Agent(self, spec) for spec in agents}
        self._ask, self.seed, self.sampling, self._play = ask, seed, sampling or Sampling(), play
        self._execute, self._check = execute, check
        self.values: dict[str, Any] = dict(values or {})
        self.rng = random.Random(derive_seed(seed, "rng"))
        self.max_turns, self.max_tool_calls = max_turns, max_tool_calls
        self._turns: dict[int, list[Turn]] = {}
        self.decisions: list[Decision] = []
        self.rewards: list[
            Mapping[str, Any]
        ] = []  # what the system itself is told the episode is worth: fields of a `Reward`
        self._next = 0
        self._given: dict[int, list[Turn]] = {}
        for turn in given:
            self._given.setdefault(turn.index, []).append(turn)
        self._replace = dict(replace or {})
        self._given_decisions = {d.index: d for d in decisions}

    def __getitem__(self, name: str) -> Agent:
        if name not in self._agents:
            raise SettingError(f"team[{name!r}]: no such agent; {nearest(name, self._agents)}")
        return self._agents[name]

    def __iter__(self) -> Iterator[Agent]:
        return iter(self._agents.values())

    def __len__(self) -> int:
        return len(self._agents)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns so far, siblings included, ordered by index."""
        return tuple(turn for index in sorted(self._turns) for turn in self._turns[index])

    def siblings(self, turn: Turn) -> tuple[Turn, ...]:
        """Every answer sampled by the call that gave `turn`, itself included."""
        return tuple(self._turns[turn.index])

    def opening(self, spec: AgentSpec, tools: Mapping[str, Tool]) -> tuple[Message, ...]:
        """System message and demonstrations that start an agent's chat: from `values` if named
        there, else from the spec."""
        prompt = str(self.values.get(f"{spec.name}.prompt", spec.prompt))
        text = "\n\n".join(part for part in (prompt, tool_prompt(tools)) if part)
        demos = self.values.get(f"{spec.name}.demos", spec.demos)
        head = (Message("system", text),) if text else ()
        where = f"{spec.name}.demos"
        return head + tuple(
            d if isinstance(d, Message) else from_json(Message, d, where) for d in demos
        )

    def tools_of(self, spec: AgentSpec) -> Mapping[str, Tool]:
        return resolve_tools(
            spec.tools, {"python": python_tool(self.execute)} if "python" in spec.tools else {}
        )

    def sampling_of(self, spec: AgentSpec, index: int, override: Sampling | None) -> Sampling:
        chosen = override or spec.sampling or self.sampling
        return (
            replace(chosen, seed=derive_seed(self.seed, spec.name, index))
            if chosen.seed is None
            else chosen
        )

    def reserve(self, count: int) -> int:
        """The next index; `count` of them are kept for this call, so that a tool loop's turns do
        not depend on timing."""
        index, self._next = self._next, self._next + count
        if index >= self.max_turns:
            raise LimitError(f"episode asked for turn {index}; max_turns is {self.max_turns}")
        return index

    async def take(
        self, call: Call, reads: tuple[int, ...], choose: Choose | None, saw_gold: bool
    ) -> Turn:
        """Get the completions of a call, recorded or live, and record them as turns. Returns the
        taken one."""
        self._turns[call.index] = []  # the call is on record even if it fails or is cancelled
        completions, sources = await self._completions(call)
        turns = [
            Turn(
                index=call.index,
                agent=call.agent.name,
                messages=call.messages,
                reads=reads,
                sibling=k,
                taken=False,
                source=source,
                saw_gold=saw_gold,
                sampling=call.sampling,
                **{f.name: getattr(c, f.name) for f in fields(c)},
            )
            for k, (c, source) in enumerate(zip(completions, sources, strict=True))
        ]
        self._turns[call.index] = turns
        picked = choose(turns) if choose and len(turns) > 1 else 0
        number = await picked if inspect.isawaitable(picked) else picked
        if not 0 <= number < len(turns):
            raise SettingError(
                f"agent {call.agent.name!r}: choose returned {number}, expected a number below"
                f" {len(turns)}"
            )
        turns[number] = replace(turns[number], taken=True)
        return turns[number]

    def settle(self, turn: Turn, *, taken: bool = True) -> None:
        """Say afterwards which sibling the chat went on with (the others are then not taken), or
        that a turn was never read."""
        self._turns[turn.index] = [
            replace(each, taken=taken if each.sibling == turn.sibling else each.taken and not taken)
            for each in self._turns[turn.index]
        ]

    async def _completions(self, call: Call) -> tuple[Sequence[Completion], list[Any]]:
        if call.index in self._replace:
            # What was sampled has its log-probabilities; a text, or tokens that somebody else wrote
            # for this prompt, has none.
            return [self._replace[call.index]], [
                "sampled" if self._replace[call.index].logprobs else "written"
            ]
        if call.index in self._given:
            recorded = self._given[call.index]
            if len(recorded) not in (
                1,
                call.n,
            ):  # 1: only the taken one was given, or it had been replaced
                raise ReplayError(
                    f"turn {call.index}: the system now asks for {call.n} answers, the recording"
                    f" has {len(recorded)}"
                )
            if recorded[0].agent != call.agent.name or recorded[0].messages != call.messages:
                raise ReplayError(
                    f"turn {call.index}: the system now asks {call.agent.name!r} something else"
                    f" than the recording did ({recorded[0].agent!r}); give only the turns before"
                    " the first change"
                )
            return [turn.completion for turn in recorded], [turn.source for turn in recorded]
        completions = await self._ask(call)
        if len(completions) != call.n:
            raise RuntimeError(
                f"agent {call.agent.name!r}: asked for {call.n} completions, got {len(completions)}"
            )
        return completions, ["sampled"] * len(completions)

    def decide(self, name: str, options: Sequence[str]) -> str:
        """Sample one of `options` and record it. `values[name]` may hold a logit per option;
        without it all are as likely."""
        if not options:
            raise SettingError(f"team.decide({name!r}): expected at least one option")
        index = len(self.decisions)
        logits = self.values.get(name) or {}
        top = max((logits.get(o, 0.0) for o in options), default=0.0)
        weights = [math.exp(logits.get(o, 0.0) - top) for o in options]
        given = self._given_decisions.get(index)
        if given and (given.name != name or given.choice not in options):
            raise ReplayError(
                f"decision {index}: the system now decides {name!r} among {options}, the recording"
                f" has {given}"
            )
        rng = random.Random(derive_seed(self.seed, "decide", index))
        choice = given.choice if given else rng.choices(list(options), weights)[0]
        logprob = math.log(weights[list(options).index(choice)] / sum(weights))
        self.decisions.append(Decision(index, name, tuple(options), choice, logprob))
        return choice

    async def tool(self, request: Mapping[str, Any], tools: Mapping[str, Tool]) -> str:
        """Run one tool call `{"name": ..., "arguments": {...}}`; a failing tool answers with its
        error as text."""
        return await run_call(request, tools)

    async def execute(
        self, program: str, externals: Externals | None = None, limits: Limits = Limits()
    ) -> ExecutionResult:
        """Run a program that a model wrote, in the sandbox: with `externals` a workflow program
        that can call these, else plain Python."""
        if self._execute is None:
            raise SandboxError(
                "team.execute: this team has no sandbox; use rollouts.play.Rollouts, or give"
                " Team(execute=...)"
            )
        return await self._execute(program, externals, limits)

    async def check(self, program: str, tests: TestSuite, limits: Limits = Limits()) -> TestResult:
        """What tests say of a program that a model wrote, in the sandbox. A team has public tests
        only; hidden ones are a reward's."""
        if self._check is None:
            raise SandboxError(
                "team.check: this team has no sandbox; use rollouts.play.Rollouts, or give"
                " Team(check=...)"
            )
        return await self._check(program, tests, limits)

    async def play(self, system: System, tasks: Sequence[Task]) -> list[Any]:
        """Play child episodes (their `parent` is this one) and return them in order."""
        if self._play is None:
            raise SettingError(
                "team.play: this team cannot play child episodes; use rollouts.play.Rollouts"
            )
        return await self._play(system, tasks)


@dataclass
class Fake:
    """Completions from a function `(agent name, messages) -> text`: a whole system runs in a test
    without any model."""

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
    **settings: Any,
) -> Team:
    """A team that answers by a function. `await system.run(task, fake_team(["a", "b"], lambda
    agent, messages: "4"))`."""
    return Team(
        [a if isinstance(a, AgentSpec) else AgentSpec(a) for a in agents], Fake(answer), **settings
    )
