"""What every method of feedback in words has to do alike: go on after a kill inside a backward pass,
come to the same on two ranks, be evaluated from its checkpoint, and ask outside models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.http import RetryPolicy
from marlora.trainers.feedback.helpers import Helpers
from tests.trainers.feedback_methods import METHODS
from tests.trainers.forks import two_ranks
from tests.trainers.loop.test_state import facts
from tests.trainers.outside import Outside

pytestmark = pytest.mark.usefixtures("one_thread")
every_method = pytest.mark.parametrize("name", METHODS)


class Cut(BaseException):
    """Stands for a kill."""


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with a finished run of each method, by its name."""
    folder = tmp_path_factory.mktemp("whole")
    for name, method in METHODS.items():
        method.make(folder / name, model).train()
    return folder


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("ask", [1, 2])
def test_a_run_that_is_killed_inside_a_step_comes_to_the_same(
    name: str, ask: int, whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the questions of a round are answered then."""
    original, rounds = Helpers.ask, 0

    def dies(self: Helpers, questions: Any) -> Any:
        nonlocal rounds
        rounds += bool(questions)
        if rounds == ask:
            original(self, questions[: (len(questions) + 1) // 2])
            raise Cut
        return original(self, questions)

    with monkeypatch.context() as patched:
        patched.setattr(Helpers, "ask", dies)
        with pytest.raises(Cut):
            METHODS[name].make(tmp_path / "run", model).train()
    METHODS[name].make(tmp_path / "run", model, resume=True).train()
    assert facts(tmp_path / "run") == facts(whole / name)


@pytest.mark.slow
@every_method
def test_evaluating_the_checkpoint_gives_what_the_run_says(
    name: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def begin(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(METHODS[name].say(), context=16_384)

    monkeypatch.setattr(team, "start_engine", begin)
    summary, out = summary_of(whole / name), tmp_path / "eval"
    checkpoint = whole / name / "checkpoints" / f"step-{summary['steps']:06d}"
    assert main(["eval", str(checkpoint), "--trust_checkpoint", "--output", str(out)]) in (0, None)
    found = json.loads((out / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"]
    assert found["after"]["accuracy"] > found["before"]["accuracy"]


@pytest.mark.slow
@every_method
def test_an_outside_model_helps_goes_down_and_is_up_again(
    name: str, whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends when the model is gone at its second question, or its only one; the
    resumed one asks what is left and comes to what one run comes to."""
    method, up, answered = METHODS[name], False, 0
    say, expected = method.say(), summary_of(whole / name)
    calls = expected["ledger"]["aside"][method.outside]["calls"]
    monkeypatch.setattr(RetryPolicy, "pause", lambda policy, number: 0.001)

    def answer(body: dict[str, Any]) -> str:
        nonlocal answered
        if answered == min(1, calls - 1) and not up:
            raise ConnectionError("the outside model is gone")
        answered += 1
        texts = [f"<|{m['role']}|>{m['content']}<|end|>" for m in body["messages"]]
        return say("".join(texts), ModelRef("big"), Sampling(), 0)

    with Outside(answer) as outside:
        own = {**method.helpers[method.outside], "url": outside.url, "base": "big"}
        helpers = {**method.helpers, method.outside: own}
        with pytest.raises(EngineError, match="500"):
            method.make(tmp_path / "run", model, helpers=helpers).train()
        up = True
        summary = method.make(tmp_path / "run", model, helpers=helpers, resume=True).train()
    assert summary["eval"] == expected["eval"]
    assert summary["state"]["values"] == expected["state"]["values"]
    assert calls <= answered
    made = summary["ledger"]["aside"][method.outside]["calls"]
    assert calls <= made <= calls + 2, "calls that failed or were cut off may be counted"


@pytest.mark.slow
@every_method
def test_a_budget_is_never_exceeded_and_the_run_ends_whole(
    name: str, whole: Path, model: Path, tmp_path: Path
) -> None:
    spent = int(summary_of(whole / name)["budget"]["spent"]["tokens"])
    limit = spent * 2 // 3
    summary = METHODS[name].make(tmp_path / "run", model, budget={"tokens": limit}).train()
    assert summary["budget"]["spent"]["tokens"] <= limit
    assert summary["done"] == "the budget is spent"
    assert summary["steps"] < summary_of(whole / name)["steps"]
    assert summary["eval"]["after"]["accuracy"] is not None


@pytest.mark.process
def test_two_ranks_learn_what_one_learns(whole: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    done = two_ranks("tests.trainers.feedback_methods", folder, model)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in METHODS:
        first, second = (
            json.loads((folder / f"{name}.rank{rank}.json").read_text(encoding="utf-8"))
            for rank in (0, 1)
        )
        assert first == second != {}, name
        assert facts(folder / name) == facts(whole / name), name
        asked = [e.id for e in Store(folder / name / "episodes") if e.kind == "aside"]
        assert len(asked) == len(set(asked)), "each question once, not once per rank"
