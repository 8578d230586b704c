"""Bars of an evaluation and of a run on a terminal."""

from __future__ import annotations

import sys

import pytest

from marlora.trainers.monitoring.progress import Progress, duration, time_left, trend


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
    progress.start(0, 3)
    progress.step(1, {"budget": {"tokens": 12345, "calls": 6, "cost": 0.0}})
    progress.step(2, {"budget": {"tokens": 23456, "calls": 9, "cost": 0.25}})
    progress.step(3, {"reward": 0.5})
    first, second, third = capsys.readouterr().err.splitlines()
    assert "| 12,345 tokens spent | 1 s left" in first
    assert "| 23,456 tokens spent (0.25 of cost) | 1 s left" in second
    assert third == "step 3/3 | reward 0.500", "none is left, and one reward has no trend"


POLICIES = {
    "a": {"tokens": 9, "loss": 0.5, "mismatch_kl": 1e-5, "grad_norm": 0.25},
    "b": {"tokens": 0, "constant_groups": 1.0},
    "c": {"tokens": 3, "applied": False},
}


@pytest.mark.parametrize("verbose", [False, True])
def test_numbers_for_developers_are_verbose_and_troubles_always_told(
    verbose: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(verbose=verbose)
    progress.start(0, 1)
    proof = {"a": {"status": "passed", "residual": 0.01}}
    row = {"reward": 1.0, "policies": POLICIES, "failed": 2, "episodes": 8, "tokens_per_s": 12.0}
    progress.step(1, {**row, "proof": proof})
    said = capsys.readouterr().err.strip()
    shown = (
        "step 1/1 | reward 1.000 | b: nothing trained (constant groups 1.00)"
        " | c: not finite, no update | 2 of 8 episodes failed"
    )
    details = " | a: loss +0.5000 kl 1.0e-05 grad 0.25 | 12 tok/s | proof a:passed(0.01)"
    assert said == shown + details * verbose


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([], ""),
        ([0.5], ""),
        ([0.25, 0.5], "↑ +0.250 in 2 steps"),
        ([0.5, 0.25, 0.25], "→ +0.000 in 2 steps"),
        ([1.0, 1.0, 0.0, 0.0], "↓ -1.000 in 4 steps"),
        # means 0.5 and 0.55, variances 0.5 and 0.405: the standard error is 0.67
        ([0.0, 1.0, 0.1, 1.0], "→ +0.050 in 4 steps"),
        ([9.0] * 90 + [0.0] * 5 + [1.0] * 5, "↑ +1.000 in 10 steps"),
    ],
)
def test_the_trend_by_hand(rewards: list[float], said: str) -> None:
    assert trend(rewards) == said


def test_the_time_left_is_the_median_steps() -> None:
    assert time_left([0.0, 10.0, 20.0, 90.0], 6) == "60 s"  # 10, 10 and 70 seconds
    assert time_left([0.0], 6) == "" and time_left([0.0, 1.0], 0) == ""
    assert [duration(s) for s in (0.2, 89, 90, 5399, 7500, 172_800 + 7200)] == [
        "1 s",
        "89 s",
        "2 min",
        "1 h 30 min",
        "2 h 5 min",
        "2 d 2 h",
    ]
