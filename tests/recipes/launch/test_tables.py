"""What is printed at the end of a run: tables of rounds, of a verifier's calibration, of sampled
debates, where there are any."""

from __future__ import annotations

from typing import Any

from marlora.recipes.launch.tables import section_text, summary_table
from marlora.rollouts.report.sections import accuracy_section, rounds_section, stored
from marlora.trainers.methods.imitation.diversity import diversity_section
from marlora.trainers.methods.policy_gradient.flowreasoner import stages_section
from marlora.trainers.methods.reward_model.calibration import (
    ScoredAnswer,
    calibration,
    calibration_section,
)

SUMMARY: dict[str, Any] = {
    "recipe": "maporl",
    "model": "m",
    "engine": "scripted",
    "steps": 3,
    "eval": {"before": None, "after": None},
    "policies": {},
    "seconds": {"total": 1.0, "rollout": 0.5, "train": 0.4, "publish": 0.1},
    "tokens": {"sampled": 10, "trained": 5},
    "live_proof": {"checks": 0, "passed": 0, "untrained": 0, "failed": 0, "max_residual": 0.0},
}


def test_a_run_without_rounds_shows_none():
    told = summary_table(SUMMARY, "runs/x")
    assert (
        "rounds" not in told and "verifier" not in told and "runs/x/checkpoints/step-000003" in told
    )


def test_rounds_and_changes():
    changes = [{"right_right": 6, "right_wrong": 1, "wrong_right": 2, "wrong_wrong": 1}]
    entry = {"answers": [10, 10], "accuracy": [0.7, 0.8], "gain": 0.1, "changes": changes}
    told = summary_table({**SUMMARY, **stored(rounds_section({"before": entry}))}, "runs/x")
    for each in ("round 2", "0.800", "+0.100", "2 of 3", "1 of 7"):
        assert each in told


def test_a_finished_run_of_0_1_shows_its_rounds_too():
    changes = [{"right_right": 6, "right_wrong": 1, "wrong_right": 2, "wrong_wrong": 1}]
    entry = {"answers": [10, 10], "accuracy": [0.7, 0.8], "gain": 0.1, "changes": changes}
    assert "2 of 3" in summary_table({**SUMMARY, "collaboration": {"before": entry}}, "runs/x")


def test_calibration():
    found = calibration([ScoredAnswer("a", 0.95, True), ScoredAnswer("a", 0.15, False)])
    told = summary_table({**SUMMARY, **stored(calibration_section(found))}, "runs/x")
    for each in ("0.9 .. 1.0", "0.950", "ECE 0.100", "a constant: 0.250", "ranked 1.000"):
        assert each in told


def test_sampled_debates_and_their_diversity():
    before, after = (
        {"accuracy": value, "ci95": [value - 0.1, value + 0.1], "num_tasks": 40}
        for value in (0.7, 0.75)
    )
    apart = {
        "generators": {"cross_nll": 0.5, "kl": 0.025},
        "critics": {"cross_nll": 0.25, "kl": 0.125},
    }
    diversity = {"before": {"consensus": 0.8}, "after": {"consensus": 0.9, **apart}}
    paired = {"difference": 0.05, "ci95": [0.01, 0.09]}
    accuracy = accuracy_section("sampled", {"before": before, "after": {**after, "paired": paired}})
    sections = stored(accuracy, diversity_section(diversity))
    told = summary_table({**SUMMARY, **sections}, "runs/x")
    for each in (
        "0.750",
        "+0.050",
        "+0.010 .. +0.090",
        "0.800",
        "0.900",
        "generators: cross nll",
        "0.025",
        "0.125",
    ):
        assert each in told


def test_best_of_n_stands_between_the_base_and_the_trained_team():
    entry = {"accuracy": 0.5, "ci95": [0.4, 0.6], "num_tasks": 100}
    found = {"before": entry, "after": entry, "paired": {"difference": 0.0, "ci95": [-0.1, 0.1]}}
    told = summary_table(
        {**SUMMARY, "eval": found, "best_of": {**entry, "n": 4, "accuracy": 0.8}}, "runs/x"
    )
    assert (
        told.index("base team")
        < told.index("base team, best of 4")
        < told.index("0.800")
        < told.index("trained team")
    )


def test_the_stages_of_flowreasoner() -> None:
    base = {
        "performance": -0.125,
        "diversity": None,
        "reward": 0.5,
        "rounds": 2.0,
        "invalid": {"name": 0.25, "syntax": 0.125},
        "exact": 0.4,
    }
    stages = {"base": base, "rl": {**base, "performance": 1.0, "invalid": {}}}
    told = section_text(stages_section(stages))
    assert [
        cell in told
        for cell in ("-0.125", "0.375", "1.000", "0.000", "base", "rl", "cannot be run")
    ] == [True] * 7
