"""Calibration worked out by hand."""

from __future__ import annotations

import pytest

from marlora.trainers.methods.reward_model.calibration import ScoredAnswer, calibration


def test_numbers_by_hand():
    """Bins .1 (one wrong), .6 (one of two right), .9 (one right): ECE = (.15 + 2 x .15 + .05) /
    4."""
    found = calibration(
        [
            ScoredAnswer("a", 0.95, True),
            ScoredAnswer("a", 0.65, False),
            ScoredAnswer("b", 0.65, True),
            ScoredAnswer("b", 0.15, False),
        ]
    )
    assert (
        found["num"] == 4
        and found["right"] == 0.5
        and found["accuracy"] == 0.75
        and found["ranked"] == 1.0
    )
    assert (
        found["brier"] == pytest.approx((0.05**2 + 0.65**2 + 0.35**2 + 0.15**2) / 4)
        and found["brier_constant"] == 0.25
    )
    assert found["ece"] == pytest.approx((0.15 + 2 * 0.15 + 0.05) / 4)
    assert [(b["low"], b["num"], b["right"]) for b in found["bins"]] == [
        (0.1, 1, 0.0),
        (0.6, 2, 0.5),
        (0.9, 1, 1.0),
    ]


def test_a_verifier_that_knows_only_how_hard_a_task_is_ranks_nothing():
    """Task a is easy, task b is hard: its scores look calibrated, and tell right from wrong for no
    task."""
    easy = [ScoredAnswer("a", 0.75, right) for right in (True, True, True, False)]
    hard = [ScoredAnswer("b", 0.25, right) for right in (True, False, False, False)]
    found = calibration(easy + hard)
    assert (
        found["ece"] == 0.0
        and found["brier"] < found["brier_constant"]
        and found["accuracy"] == 0.75
    )
    assert found["ranked"] == 0.5


def test_edges():
    found = calibration([ScoredAnswer("a", 1.0, True), ScoredAnswer("a", 1.0, True)])
    assert found["bins"][0]["low"] == 0.9 and found["ranked"] is None and found["brier"] == 0.0
    with pytest.raises(ValueError, match="no answers"):
        calibration([])
