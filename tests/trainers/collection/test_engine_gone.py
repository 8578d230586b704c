"""No server is left: the run ends with one clear error, and what was finished is in a checkpoint
that resume takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.report.report import write_report
from marlora.trainers.update.optimizer_step import UpdateResult
from tests.trainers import small_run


def gone(*_: Any, **__: Any) -> Any:
    raise EngineError("all 2 servers are gone")


def steps(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("where", ["generate", "publish"])
def test_the_last_finished_step_is_saved_and_resume_ends_like_a_run_that_was_never_cut(
    tmp_path: Path, model: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone while step 3 is played, or while step 2's adapters are published."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    run = small_run.trainer(cut, model, max_steps=3, save_every=100)
    learn = run.learn

    def and_then_gone(step: int, episodes: Any) -> dict[str, Any]:
        done = learn(step, episodes)
        if step == 2:
            monkeypatch.setattr(TransformersEngine, where, gone)
        return done

    monkeypatch.setattr(run, "learn", and_then_gone)
    with pytest.raises(EngineError, match="all 2 servers are gone"):
        run.train()
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-000002"] and steps(
        cut
    ) == [1, 2]
    report = write_report(cut).read_text()
    assert (
        "did not end" in report and "the run ended after step 2: all 2 servers are gone" in report
    )
    monkeypatch.undo()
    found = small_run.trainer(cut, model, max_steps=3, resume=True).train()
    expected = small_run.trainer(whole, model, max_steps=3).train()
    assert (
        found["policies"] == expected["policies"]
        and found["tokens"] == expected["tokens"]
        and steps(cut) == [1, 2, 3]
    )


def test_a_step_that_was_cut_off_while_it_learnt_is_not_saved(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run.trainer(tmp_path / "run", model, max_steps=2, save_every=100)
    learn = run.run.learner.learn

    def twice(step: int, *args: Any) -> dict[str, UpdateResult]:
        learn(step, *args)
        return gone()  # a method that plays between two updates

    monkeypatch.setattr(run.run.learner, "learn", twice)
    with pytest.raises(EngineError):
        run.train()
    assert not (tmp_path / "run/checkpoints").exists()
