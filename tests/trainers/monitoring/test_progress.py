"""Bars of an evaluation and of a run on a terminal."""

from __future__ import annotations

import sys

import pytest

from marlora.trainers.monitoring.progress import Progress


@pytest.mark.parametrize(("total", "bars"), [(0, ["eval"]), (3, ["steps", "eval"])])
def test_only_a_run_has_a_bar_of_steps(
    total: int, bars: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress()
    assert progress.live
    progress.start(0, total)
    try:
        with progress.episodes("eval", 4, 0, "exact"):
            assert progress._bars is not None
            assert [task.description for task in progress._bars.tasks] == bars
    finally:
        progress.close()


def test_a_step_says_what_has_been_spent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.step(1, {"budget": {"tokens": 12345, "calls": 6, "cost": 0.0}})
    progress.step(2, {"budget": {"tokens": 23456, "calls": 9, "cost": 0.25}})
    progress.step(3, {"reward": 0.5})
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith("12,345 tokens spent")
    assert second.endswith("23,456 tokens spent (0.25 of cost)") and "spent" not in third
