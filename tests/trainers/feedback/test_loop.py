"""The loop with other pieces than TextGrad's: methods of a few lines, as pages name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.building_blocks import BuildingBlocks
from marlora.agents.state import Param
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.transcript import Output
from marlora.agents.types import Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.config import RunConfig
from marlora.trainers.feedback.config import FeedbackConfig
from marlora.trainers.feedback.evaluators import RuleWords
from marlora.trainers.feedback.gates import TwoStageGate, ValidationGate
from marlora.trainers.feedback.history import failed_proposals
from marlora.trainers.feedback.loop import Pieces
from marlora.trainers.feedback.propagators import PerNode, WholeGraph
from marlora.trainers.feedback.rewriters import Jointly, PerParam
from marlora.trainers.methods.text_feedback.feedback_trainer import FeedbackTrainer
from tests.trainers.feedback_run import CHAT, Cut, dies_in_round, signs, trainer
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
JOINT = {"rewrite_system": "You rewrite.", "rewrite": "{variables}\n{feedback}\n{history}"}


@dataclass
class PagedConfig(FeedbackConfig, RunConfig):
    """What every feedback method has."""


class Paged(FeedbackTrainer[PagedConfig]):
    """A method of a page; a subclass names its pieces."""

    Config = PagedConfig

    def own(self) -> dict[str, Any]:
        raise NotImplementedError

    def pieces(self) -> Pieces:
        made = {"gate": ValidationGate(self.args.gate), **self.own()}
        return Pieces(evaluator=RuleWords(self.spec.metric), **made)


# numbers and one call for all of them (Trace)


@dataclass
class Product(System):
    """y = x + 3, z = 3 y: the toy of Trace's sheet, with a param that nothing reads."""

    def params(self) -> tuple[Param, ...]:
        return (Param("x", 2, "number"), Param("flag", "off", "choice", options=("off", "on")))

    def conflict(self, values: Mapping[str, Any]) -> str | None:
        large = values.get("x", 2) > 10
        return "x above 10 needs flag on" if large and values.get("flag") != "on" else None

    async def run(self, task: Task, team: Team) -> Output:
        x = team.values.get("x", 2)
        y = team.record("add", str(x + 3))
        if x == 0:
            raise ValueError("x must not be 0")
        z = team.record("multiply", str(3 * int(y.text)), reads=[y])
        return Output(z.text, [z])


class Joint(Paged):
    def own(self) -> dict[str, Any]:
        return {"prompts": JOINT, "propagator": WholeGraph(), "rewriter": Jointly()}


def products(split: str, seed: int = 0, **_: Any) -> list[Task]:
    return [Task(f"{split}{n}", f"make it 24 ({split} {n})", "24", split=split) for n in range(4)]


def joint(folder: Path, model: Path, replies: list[str], **changes: Any) -> Joint:
    left = list(replies)
    made: Joint = trainer(
        folder,
        model,
        cls=Joint,
        config=PagedConfig,
        system=Product(["unused"]),
        say=lambda prompt, ref, sampling, k: f"<SUGGESTION>{left.pop(0)}</SUGGESTION>",
        tasks="tests.trainers.feedback.test_loop:products",
        params=["x", "flag"],
        gate="always",
        num_val_tasks=0,
        tasks_per_step=1,
        max_steps=len(replies),
        agents={"unused": {"policy": "base"}},
        **changes,
    )
    return made


def test_a_number_is_rewritten_by_one_call(model: Path, tmp_path: Path) -> None:
    """Fact U1 of Trace: 2 becomes 5, an int, by one call; z is 15, then 24."""
    reply = json.dumps({"reasoning": "(5 + 3) * 3", "suggestion": {"x": "5"}})
    made = joint(tmp_path / "run", model, [reply])
    summary = made.train()
    assert made.run.values == {"x": 5} and summary["eval"]["after"]["accuracy"] == 1
    outputs = [e.output for e in Store(tmp_path / "run" / "episodes") if e.kind == "train"]
    assert outputs == ["15"] and summary["ledger"]["aside"]["optimizer"]["calls"] == 1
    assert made.feedback.history.updates[0]["note"] == "(5 + 3) * 3"


def test_an_exception_is_feedback_and_refused_values_change_nothing(
    model: Path, tmp_path: Path
) -> None:
    """A program that raises is repaired by the next step; a value that its param does not take, and
    JSON that is none, leave all as it is."""
    replies = [
        '{"suggestion": {"x": 0}}',
        '{"suggestion": {"x": "a lot", "flag": "maybe"}}',
        '{"suggestion": {"x": 5',
        '{"reasoning": "it raises", "suggestion": {"x": 5, "flag": "on"}}',
    ]
    made = joint(tmp_path / "run", model, replies)
    summary = made.train()
    assert made.run.values["x"] == 5 and summary["eval"]["after"]["accuracy"] == 1
    asked = sorted(
        (e for e in Store(tmp_path / "run" / "episodes") if e.kind == "aside"), key=lambda e: e.step
    )
    assert "ValueError: x must not be 0" in asked[1].task.prompt
    found = [row["text_feedback"] for row in rows(tmp_path / "run")]
    assert [row["failed"] for row in found] == [0, 1, 1, 1]
    assert [row["refused"] for row in found] == [0, 2, 0, 0]
    assert [row["unreadable"] for row in found] == [0, 0, 1, 0]
    assert [row["adopted"] for row in found] == [True, False, False, True]


def test_values_that_are_legal_alone_and_not_together_are_refused(
    model: Path, tmp_path: Path
) -> None:
    """What a value needs of another one stands in `System.conflict`."""
    replies = [
        '{"suggestion": {"x": 11}}',
        '{"suggestion": {"x": 11, "flag": "on"}}',
        '{"suggestion": {"flag": "off"}}',
    ]
    made = joint(tmp_path / "run", model, replies)
    made.train()
    found = [row["text_feedback"] for row in rows(tmp_path / "run")]
    assert [row["refused"] for row in found] == [1, 0, 1]
    assert [row["adopted"] for row in found] == [False, True, False]
    assert made.run.values == {"x": 11, "flag": "on"}
    blocks = BuildingBlocks(["solver", "reader"], reflector="reader")
    assert blocks.conflict({"reflect": 1, "execute": 1}) is None
    assert "without reflect" in str(blocks.conflict({"execute": 1}))


def test_a_step_in_which_every_episode_failed_is_paid_for_once(model: Path, tmp_path: Path) -> None:
    """The second agent's prompt never fits; the run is killed in the backward pass."""

    def failing(folder: Path, **changes: Any) -> Any:
        system = Chain(["solver", "last"], views={"last": "long " * 4000 + "{previous}"})
        agents = {name: {"policy": "base", "prompt": name} for name in ("solver", "last")}
        own = {"system": system, "agents": agents, "gate": "always", "num_eval_tasks": 1}
        return trainer(folder, model, **own, max_steps=1, **changes)

    whole = failing(tmp_path / "whole").train()
    assert whole["ledger"]["train"]["solver"]["calls"] == 3
    assert [row["text_feedback"]["failed"] for row in rows(tmp_path / "whole")] == [3]
    killed = failing(tmp_path / "run")
    dies_in_round(killed, 1)
    with pytest.raises(Cut):
        killed.train()
    again = failing(tmp_path / "run", resume=True).train()
    assert again["ledger"]["train"]["solver"]["calls"] == 3
    assert again["budget"]["spent"] == whole["budget"]["spent"]
    played = [
        [e.id for e in Store(tmp_path / n / "episodes").read(kind="train")]
        for n in ("whole", "run")
    ]
    assert sorted(played[0]) == sorted(played[1]) and len(played[0]) == 3


# several proposals and two stages (LLM-AutoDiff)


class Several(Paged):
    def own(self) -> dict[str, Any]:
        return {
            "prompts": {**JOINT, "rewrite": "{value}{feedback}{history}"},
            "propagator": WholeGraph(),
            "rewriter": PerParam(temperatures=(1.0, 0.5), note="METHOD"),
            "view": failed_proposals(),
            "gate": TwoStageGate(),
            "num_proposals": 5,
        }


@pytest.mark.parametrize("good", [2, 9])
def test_the_first_of_several_proposals_that_passes_ends_the_step(
    good: int, model: Path, tmp_path: Path
) -> None:
    """The sheet's script: two useless proposals, then the rule. Without one, five fail and the old
    values stay. Failed ones are shown without their values."""
    count = 0

    def optimizer(question: str) -> str:
        nonlocal count
        text = (
            "@ means plus. # means times. % means twice-plus." if count == good else f"no {count}"
        )
        count += 1
        return f"<METHOD>way {count}</METHOD><IMPROVED_VARIABLE>{text}</IMPROVED_VARIABLE>"

    from tests.trainers.feedback_run import scripted

    made = trainer(
        tmp_path / "run",
        model,
        cls=Several,
        config=PagedConfig,
        say=scripted(optimizer=optimizer),
        max_steps=1,
    )
    summary = made.train()
    updates = made.feedback.history.updates
    passed = good < 5
    assert [u["status"] for u in updates] == (
        ["rejected", "rejected", "adopted"] if passed else ["rejected"] * 5
    )
    assert summary["eval"]["after"]["accuracy"] == passed
    asked = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "aside"]
    asked.sort(key=lambda e: e.task.id)
    assert len(asked) == len(updates)
    assert "way 1" in asked[1].task.prompt and "way 2" in asked[2].task.prompt
    assert "no 0" not in asked[1].task.prompt, "its value is hidden"
    assert [e.turns[0].sampling.temperature for e in asked][:3] == [1.0, 0.5, 0.5]
    trials = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "trial"]
    on_batch = {e.task.id for e in trials if e.task.id in {f.task.id for f in trials[:3]}}
    assert len(on_batch) == 3, "the first stage is on the tasks of the step"
    assert "minibatch" in updates[0]["why"]


class FromTheStart(Several):
    def own(self) -> dict[str, Any]:
        changed = {"gate": ValidationGate("not_worse"), "num_proposals": 1}
        return {**super().own(), **changed, "start": lambda pool, rng: (pool[0],)}


def test_a_proposal_may_begin_with_earlier_values(model: Path, tmp_path: Path) -> None:
    """What it begins with is chosen among candidates that were measured; at first none is. It is
    compared with the values in force all the same."""
    from tests.trainers.feedback_run import scripted

    count = iter(range(9))
    say = scripted(optimizer=lambda q: f"<IMPROVED_VARIABLE>no {next(count)}</IMPROVED_VARIABLE>")
    made = trainer(
        tmp_path / "run",
        model,
        cls=FromTheStart,
        config=PagedConfig,
        say=say,
        max_steps=3,
        num_val_tasks=3,
        num_eval_tasks=3,
    )
    made.train()
    assert made.run.values == {"solver.prompt": "no 2"}, "equal scores pass"
    asked = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "aside"]
    assert ["<VARIABLE>\nWork it out." in e.task.prompt for e in asked] == [True] * 3


# per node, jointly rewritten (semantic backpropagation)


class Neighbours(Paged):
    def own(self) -> dict[str, Any]:
        return {
            "prompts": {
                "backward_system": "I am backward",
                "node": "{instruction}{task}{hints}{output}{feedback}",
                "rewrite_system": "I am optimizer",
                "rewrite": "{role}{value}{feedback}",
            },
            "propagator": PerNode(),
            "rewriter": PerParam(),
        }


def says(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """`first` works it out if its prompt says so, and `last` repeats; the helpers say the rule."""
    messages = CHAT.findall(prompt)
    system = messages[0][1]
    user = [text for role, text in messages if role == "user"][-1]
    if system.startswith("I am backward"):
        return "Hint 1: say ready"
    if system.startswith("I am optimizer"):
        said = "say ready" if "say ready" in user else "as before"
        return f"<IMPROVED_VARIABLE>{said}</IMPROVED_VARIABLE>"
    if system == "say ready":
        return "ready"
    return "ready" if "ready" in user else "no"


def readies(split: str, seed: int = 0, **_: Any) -> list[Task]:
    return [Task(f"{split}{n}", f"{split} {n}", "ready", split=split) for n in range(6)]


def test_the_first_agents_prompt_is_reached_through_the_last(model: Path, tmp_path: Path) -> None:
    made = trainer(
        tmp_path / "run",
        model,
        cls=Neighbours,
        config=PagedConfig,
        system=Chain(["first", "last"], views={"last": "Repeat: {previous}"}),
        engine=ScriptedEngine(says, context=16_384),
        tasks="tests.trainers.feedback.test_loop:readies",
        rewards=["exact"],
        agents={n: {"policy": "base", "prompt": f"I am {n}"} for n in ("first", "last")},
        gate="strictly_better",
        num_val_tasks=2,
        tasks_per_step=2,
        max_steps=1,
    )
    summary = made.train()
    assert made.run.values == {"first.prompt": "say ready", "last.prompt": "as before"}
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls == {"backward": 2, "optimizer": 2}, "B one per error, O one per node"


def test_splits_do_not_overlap(model: Path, tmp_path: Path) -> None:
    """Fact U6 of semantic backpropagation."""
    spec = trainer(tmp_path / "run", model).spec
    splits = [{t.id for t in each} for each in (spec.tasks, spec.val_tasks, spec.eval_tasks)]
    assert len(set.union(*splits)) == sum(map(len, splits)) == len(signs("train")) + 12
