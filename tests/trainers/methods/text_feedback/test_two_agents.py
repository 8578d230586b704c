"""Teams of two whose instructions are both wrong: each is moved by what came over its own edge, and
by nothing that was said to the other one. The sign `@`, and the amount that is added, mean one thing
to one agent and another thing to the other, so feedback that takes the wrong edge teaches nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import AgentSpec, Sampling, Task, Turn
from marlora.rollouts.tasks.toy import program_tasks
from marlora.trainers.feedback.backward import ByParam, Case
from marlora.trainers.feedback.helpers import Helpers
from marlora.trainers.feedback.loop import Pieces
from marlora.trainers.feedback.propagators import Propagator
from marlora.trainers.feedback.targets import Target
from marlora.trainers.methods.text_feedback.llm_autodiff import LLMAutoDiffTrainer
from marlora.trainers.methods.text_feedback.textgrad import TextGradTrainer
from marlora.trainers.testbeds.critic.runs import GRADIENT, critic_run
from marlora.trainers.testbeds.critic.teacher import KIND, START
from tests.trainers.feedback_run import (
    EXAMPLE,
    MEANS,
    OPERATIONS,
    rewrite,
    rewrite_with_method,
    scripted,
    solve,
    trainer,
)

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = "tests.trainers.methods.text_feedback.test_two_agents"


@dataclasses.dataclass(frozen=True)
class Crossed:
    """Control: another propagator's feedback, with that on each of two params given to the other
    one. Its calls are the same."""

    propagator: Propagator

    def propagate(
        self, helpers: Helpers, cases: Sequence[Case], targets: Sequence[Target]
    ) -> ByParam:
        given = self.propagator.propagate(helpers, cases, targets)
        first, second = given
        return {first: given[second], second: given[first]}


def cross(monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    """Let runs of this trainer cross the feedback of their two params."""
    own = cls.pieces

    def pieces(self: Any) -> Pieces:
        found: Pieces = own(self)
        return dataclasses.replace(found, propagator=Crossed(found.propagator))

    monkeypatch.setattr(cls, "pieces", pieces)


# a chain with scripted helpers

MEANINGS = {"left": "plus", "right": "times"}
METHODS: dict[str, tuple[Any, Any]] = {
    "textgrad_prompts": (TextGradTrainer, rewrite),
    "llm_autodiff": (LLMAutoDiffTrainer, rewrite_with_method),
}


def chained(split: str, seed: int = 0, **_: Any) -> list[Task]:
    """Two sums in one sign, which is `plus` in the first and `times` in the second: 24 tasks to
    train on, 8 held out."""
    numbers = range(3, 11)
    sums = [(a, b) for a in numbers for b in (12, 13, 14, 15) if (b == 15) == (split != "train")]
    plus, times = (OPERATIONS[MEANINGS[name]] for name in ("left", "right"))
    return [
        Task(
            f"{split}-{a}-{b}",
            f"{a} @ {b}, {b} @ {a}",
            f"{plus(a, b)} {times(b, a)}",
            split=split,
            meta={"first": f"{a} @ {b}", "second": f"{b} @ {a}"},
        )
        for a, b in sums
    ]


def works(system: str, question: str) -> str:
    """`left` answers its sum; `right` repeats that and adds the answer to its own."""
    _, _, before = question.partition(" after ")
    return f"{before} {solve(system, question)}".strip()


def criticises(question: str, silent: str = "") -> str:
    """What should have been said instead: of the whole output first, then, along the edge to
    `left`, its first part, and of an agent's own part what the sign means. Nothing along the edge
    to `silent`."""
    wanted = re.findall(r"(?:expected output is|should have been): ([\d ]+)", question)[-1].split()
    on_left = "the output of 'left'" in question
    if (on_left and silent == "left") or (f"'{silent}.prompt'" in question and silent == "right"):
        return ""
    if on_left or "got this feedback" not in question:
        return f"It should have been: {wanted[0] if on_left else ' '.join(wanted)}"
    (asked,) = re.findall(r"<INPUT>\n(.*?)\n</INPUT>", question)
    a, _, b = EXAMPLE.search(asked).groups()  # type: ignore[union-attr]
    fits = [name for name, of in OPERATIONS.items() if of(int(a), int(b)) == int(wanted[-1])]
    return f"@ means {fits[0]}." if len(fits) == 1 else "It is unclear."


def chain_run(name: str, folder: Path, model: Path, silent: str = "", **changes: Any) -> Any:
    cls, optimizer = METHODS[name]
    views = {"left": "{first}", "right": "{second} after {previous}"}
    agents = {each: {"policy": "base", "prompt": "@ means minus."} for each in MEANINGS}
    settings: dict[str, Any] = dict(
        cls=cls,
        config=cls.Config,
        system=Chain([*MEANINGS], views=views),
        say=scripted(works, lambda question: criticises(question, silent), optimizer),
        tasks=f"{HERE}:chained",
        rewards=["exact"],
        agents=agents,
        num_val_tasks=6,
        num_eval_tasks=8,
        max_steps=2,
    )
    return trainer(folder, model, **{**settings, **changes})


def meanings(run: Any) -> dict[str, str]:
    """What the sign means by each agent's prompt after a run."""
    values = run.run.values
    return {
        name: dict(MEANS.findall(values.get(f"{name}.prompt", "@ means minus.")))["@"]
        for name in MEANINGS
    }


@pytest.mark.parametrize("name", METHODS)
def test_each_prompt_of_a_chain_learns_what_came_over_its_own_edge(
    name: str, model: Path, tmp_path: Path
) -> None:
    made = chain_run(name, tmp_path / "run", model)
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    assert meanings(made) == MEANINGS
    (adopted,) = [c for c in made.feedback.search.candidates if c.adopted and c.parents]
    assert {*adopted.note.splitlines()} == {
        f"{agent}.prompt: @ means {meaning}." for agent, meaning in MEANINGS.items()
    }, "which feedback moved which text"


@pytest.mark.parametrize("silent", MEANINGS)
def test_an_edge_that_says_nothing_moves_nothing(silent: str, model: Path, tmp_path: Path) -> None:
    made = chain_run("textgrad_prompts", tmp_path / "run", model, silent)
    summary = made.train()
    assert meanings(made) == {**MEANINGS, silent: "minus"}
    assert f"{silent}.prompt" not in made.run.values
    assert summary["eval"]["after"]["accuracy"] == 0, "the output needs both"


def test_feedback_that_is_crossed_teaches_each_the_wrong_thing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of as many calls: both prompts move, and no answer is right."""
    cross(monkeypatch, TextGradTrainer)
    made = chain_run("textgrad_prompts", tmp_path / "run", model)
    summary = made.train()
    assert meanings(made) == {"left": "times", "right": "plus"}
    assert summary["eval"]["after"]["accuracy"] == 0


# a team of tiny models that criticise themselves

AMOUNTS = {"low": 7, "high": 3}


def two_amounts(split: str, seed: int = 0, **_: Any) -> list[Task]:
    """Problems that ask for the last digit plus 7 below 500, plus 3 from there on."""
    return [
        dataclasses.replace(task, answer=str((int(task.prompt[-1]) + AMOUNTS[half(task)]) % 10))
        for task in program_tasks(split, seed, kinds=KIND)
    ]


def half(task: Task) -> str:
    return "low" if int(task.prompt[1:]) < 500 else "high"


class Halves(System):
    """The agent `low` answers problems below 500, `high` the others."""

    async def run(self, task: Task, team: Team) -> Turn:
        return await team[half(task)].reply(task.prompt)


def halves_run(folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    greedy = Sampling(temperature=0, max_tokens=2)
    specs = [AgentSpec(name, "", START, policy="base", sampling=greedy) for name in AMOUNTS]
    settings: dict[str, Any] = dict(
        seed=seed,
        tasks=f"{HERE}:two_amounts",
        task_args={},
        prompts={**GRADIENT, "rewrite_system": "edit!"},
        gate="strictly_better",
        num_val_tasks=12,
        num_eval_tasks=20,
        max_steps=8,
    )
    return critic_run(
        "textgrad_prompts", folder, system=Halves(specs), **{**settings, **changes}
    ).train()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_tiny_models_learn_each_from_its_own_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word is the model's: it answers, criticises and rewrites. With what was said of the
    other agent's problems, at as many steps, hardly a problem is solved."""

    def after(name: str) -> float:
        runs = [halves_run(tmp_path / f"{name}-{seed}", seed) for seed in range(3)]
        return sum(float(run["eval"]["after"]["accuracy"]) for run in runs) / len(runs)

    own = after("own")
    cross(monkeypatch, TextGradTrainer)
    crossed = after("crossed")
    print(own, crossed)
    assert own >= 0.7 and crossed <= 0.35
