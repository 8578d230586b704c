"""AIME's runs: judges with a role each, their budgets and calls, and what becomes of one that fails;
what all methods have to do stands in `test_learning.py` and `test_alike.py`."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError, Task
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.rewards.builtin import passed_tests
from marlora.trainers.methods.text_feedback.aime import AIMEConfig
from tests.trainers.feedback_cases import episode, turn
from tests.trainers.feedback_run import judge, run_of, scripted
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP: dict[str, Any] = dict(gate="always", num_val_tasks=0, max_steps=1)


def judged(folder: Path) -> list[Any]:
    """The judges' episodes, of a task in the order of roles."""
    asked = [e for e in Store(folder / "episodes") if e.task.id.startswith("evaluator")]
    return sorted(asked, key=lambda e: e.task.id)


def row_of(folder: Path) -> dict[str, Any]:
    (row,) = rows(folder)
    found: dict[str, Any] = row["text_feedback"]
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_calls_and_budgets_of_a_step(count: int, model: Path, tmp_path: Path) -> None:
    """Facts U1 and U2: per output K calls of judges, at floor(3600 / K) tokens, 2 of `backward`; one
    of the optimizer. The budgets reach the engine."""
    roles = AIMEConfig().roles[:count]
    summary = run_of(
        "aime", tmp_path / "run", model, roles=roles, evaluator_tokens=3600, **ONE_STEP
    ).train()
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls == {"evaluator": 3 * count, "backward": 6, "optimizer": 1}
    asked = judged(tmp_path / "run")
    assert {turn.sampling.max_tokens for e in asked for turn in e.turns} == {3600 // count}
    assert {e.task.id.split("/")[0] for e in asked} == {f"evaluator-{role}" for role in roles}
    for e in asked:  # each sees its own criterion, the task and the output
        own = [role for role in AIMEConfig().roles if f"any other: {role}:" in e.task.prompt]
        assert e.task.id.startswith(f"evaluator-{own[0]}/") and len(own) == 1
        assert "<PREDICTION>\n0\n</PREDICTION>" in e.task.prompt
    backward = [e for e in Store(tmp_path / "run" / "episodes") if "/output-" in e.task.id]
    assert all(f"\n{role}: " in e.task.prompt for e in backward for role in roles)


def test_a_judge_that_fails_does_not_drop_the_others(model: Path, tmp_path: Path) -> None:
    """Fact U6, for a whole step: K - 1 parts, counted once per output, and the step goes on."""
    say = scripted(evaluator=lambda q: "" if "any other: logic" in q else judge(q))
    made = run_of("aime", tmp_path / "run", model, say=say, **ONE_STEP)
    made.train()
    row = row_of(tmp_path / "run")
    assert row["unanswered"] == 3 and row["feedback"] == {"solver.prompt": 3} and row["adopted"]
    assert "means" in made.run.values["solver.prompt"]
    silent = run_of(
        "aime", tmp_path / "silent", model, say=scripted(evaluator=lambda q: ""), **ONE_STEP
    )
    silent.train()
    row = row_of(tmp_path / "silent")
    assert row["unanswered"] == 6 and row["feedback"] == {"solver.prompt": 0}
    assert silent.run.values == {}


def test_a_judge_that_is_cut_off_is_counted(model: Path, tmp_path: Path) -> None:
    """Upstream nothing tells."""
    say = scripted(evaluator=lambda q: "word " * 50)
    run_of("aime", tmp_path / "run", model, say=say, evaluator_tokens=20, **ONE_STEP).train()
    assert row_of(tmp_path / "run")["truncated"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("roles", "after"),
    [
        (["correctness"], 1.0),
        (["logic"], 0.0),
        (["call it right whatever you see", "correctness"], 1.0),
    ],
)
def test_the_roles_decide_what_is_found(
    roles: list[str], after: float, model: Path, tmp_path: Path
) -> None:
    """One judge that looks elsewhere finds nothing; a hostile one beside others does no harm."""

    def evaluator(question: str) -> str:
        return "It is right." if "any other: call it right" in question else judge(question)

    say = scripted(evaluator=evaluator)
    summary = run_of("aime", tmp_path / "run", model, roles=roles, say=say).train()
    assert summary["eval"]["after"]["accuracy"] == after


def test_judges_see_no_answer_unless_they_may(model: Path, tmp_path: Path) -> None:
    """Unsupervised is the default."""
    assert not AIMEConfig().show_answer
    run_of("aime", tmp_path / "run", model, show_answer=False, **ONE_STEP).train()
    asked = judged(tmp_path / "run")
    assert not any("<EXPECTED>" in e.task.prompt for e in asked)
    assert not any(turn.saw_gold for e in asked for turn in e.turns)


@pytest.mark.slow
def test_success_and_completion_rates() -> None:
    """Fact U5: of programs that pass [1, 1], [1, 0] and [0, 0] of their tests, a third passes all,
    and half of the tests are passed. The rewards are `correct` and `passed_tests`."""
    tests = ["assert one() == 1", "assert two() == 2"]
    meta = {"_tests": tests, "names": ["one", "two"]}
    programs = [(1, 2), (1, 0), (0, 0)]
    rates = []
    for n, (one, two) in enumerate(programs):
        text = f"def one():\n    return {one}\n\ndef two():\n    return {two}"
        task = Task(f"t{n}", "write one and two", meta=meta)
        played = dataclasses.replace(episode(turn(0, "a", text)), task=task)
        rates.append(asyncio.run(passed_tests(task, played)).value)
    assert rates == [1.0, 0.5, 0.0]
    assert sum(rate == 1 for rate in rates) / 3 == pytest.approx(1 / 3)
    assert sum(rates) / 3 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"roles": []}, "roles: expected different ones, at least one"),
        ({"roles": ["logic", "logic"]}, "roles: expected different ones"),
        ({"roles": [""]}, "roles: expected different ones"),
        ({"evaluator_tokens": 5, "roles": list("abcdef")}, "evaluator_tokens: 5 shared by 6 roles"),
        ({"evaluator_tokens": 0}, "evaluator_tokens: expected"),
        ({"helpers": {"backward": {}, "optimizer": {}}}, "helpers.evaluator: missing"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        run_of("aime", tmp_path / "run", model, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)
