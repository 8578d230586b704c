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
