"""What is printed at the end of a run: tables of rounds and of a verifier's calibration, where there are any."""

from __future__ import annotations

from typing import Any

from marlora.recipes.tables import summary_table
from marlora.trainers.calibration import Judged, calibration

SUMMARY: dict[str, Any] = {
    "recipe": "maporl", "model": "m", "engine": "scripted", "steps": 3, "eval": {"before": None, "after": None}, "policies": {},
    "seconds": {"total": 1.0, "rollout": 0.5, "train": 0.4, "publish": 0.1}, "tokens": {"sampled": 10, "trained": 5},
    "live_proof": {"checks": 0, "passed": 0, "untrained": 0, "failed": 0, "max_residual": 0.0},
}  # fmt: skip


def test_a_run_without_rounds_shows_none():
    told = summary_table(SUMMARY, "runs/x")
    assert "rounds" not in told and "verifier" not in told and "runs/x/checkpoints/step-000003" in told


def test_rounds_and_changes():
    changes = [{"right_right": 6, "right_wrong": 1, "wrong_right": 2, "wrong_wrong": 1}]
    entry = {"answers": [10, 10], "accuracy": [0.7, 0.8], "gain": 0.1, "changes": changes}
    told = summary_table({**SUMMARY, "collaboration": {"before": entry}}, "runs/x")
    for each in ("round 2", "0.800", "+0.100", "2 of 3", "1 of 7"):
        assert each in told


def test_calibration():
    found = calibration([Judged("a", 0.95, True), Judged("a", 0.15, False)])
    told = summary_table({**SUMMARY, "verifier": {"calibration": found}}, "runs/x")
    for each in ("0.9 .. 1.0", "0.950", "ECE 0.100", "a constant: 0.250", "ranked 1.000"):
        assert each in told
