"""What is printed at the end of a run: tables of rounds, of a verifier's calibration, of sampled
debates, where there are any."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from marlora.recipes.launch.tables import section_text, summary_table, table
from marlora.rollouts.report.sections import (
    accuracy_rows,
    accuracy_section,
    interval,
    rounds_section,
    signed_interval,
    stored,
)
from marlora.rollouts.rewards.builtin import REWARDS
from marlora.rollouts.rewards.judge import judge
from marlora.trainers.loop.summary import measured_name
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


def test_a_run_that_trained_no_weight_shows_no_adapters_and_no_proof():
    text = summary_table(SUMMARY, "runs/x")
    assert "live proof" not in text and "hash before" not in text and "--ablate" not in text
    assert "marlora eval runs/x/checkpoints/step-000003" in text
    same = {"trainable_parameters": 0, "sha256_before": "a" * 64, "sha256_after": "a" * 64}
    served = {**SUMMARY["live_proof"], "identity": 2}
    text = summary_table({**SUMMARY, "policies": {"solver": same}, "live_proof": served}, "runs/x")
    assert "live proof: nothing was trained" in text and "hash before" not in text
    assert "0 passed" not in text


def test_a_run_that_trained_shows_its_adapters_and_its_proof():
    entry = {"trainable_parameters": 8, "sha256_before": "a" * 64, "sha256_after": "b" * 64}
    proof = {"checks": 3, "passed": 2, "untrained": 1, "failed": 0, "max_residual": 0.01}
    changed = {"policies": {"solver": entry}, "live_proof": proof}
    text = summary_table({**SUMMARY, **changed}, "runs/x")
    assert "live proof: 3 checks, 2 passed, 1 untrained, 0 failed" in text
    assert "hash before" in text and "--ablate" in text


def spent_row(calls: int, cost: float = 0.0) -> dict[str, Any]:
    names = ("prompt_tokens", "sampled_tokens", "cached_tokens", "seconds")
    return {"calls": calls, **dict.fromkeys(names, 1000 * calls), "cost": cost}


def test_what_was_spent_on_what_and_why_the_run_ended() -> None:
    """The sum of two agents by hand; nothing of it in the summary of a run of 0.1."""
    ledger = {"train": {"a": spent_row(1), "b": spent_row(2)}, "aside": {"critic": spent_row(3)}}
    by_policy = {"train": {"base": spent_row(3)}, "aside": {"critic": spent_row(3)}}
    stopped = "budget.tokens is 9000: 9000 spent, and the next call needs 20"
    budget = {"limit": {"tokens": 9000}, "spent": {"tokens": 9000, "calls": 6, "cost": 0.0}}
    spent = {"ledger": ledger, "ledger_by_policy": by_policy, "done": "the budget is spent"}
    summary = {**SUMMARY, **spent, "budget": {**budget, "stopped": stopped}}
    told = summary_table(summary, "runs/x")
    lines = [line.replace("│", " ").split() for line in told.splitlines()]
    assert ["train", "all", "3", "3,000", "3,000", "3,000", "3,000"] in lines
    assert ["aside", "critic", "3", "3,000", "3,000", "3,000", "3,000"] in lines
    assert ["aside", "all"] not in [line[:2] for line in lines], "one agent is its own sum"
    for expected in (
        "What was spent, by policy",
        "has spent 9,000 of 9,000 tokens, 6 calls. The budget ended the run: budget.tokens is 9000",
        "the run ended early: the budget is spent",
    ):
        assert expected in told, expected
    assert "cost" not in told and "spent" not in summary_table(SUMMARY, "runs/x")
    same = {**summary, "ledger_by_policy": ledger, "done": ""}
    told = summary_table(same, "runs/x")
    assert "by policy" not in told and "ended early" not in told
    priced = {"aside": {"critic": spent_row(3, 0.25)}}
    told = summary_table({**summary, "ledger": priced, "ledger_by_policy": {}}, "runs/x")
    assert "0.2500" in told and "cost" in told


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


def _measured_in(text: str) -> str:
    return next(line for line in text.splitlines() if "held-out" in line)


@pytest.mark.parametrize(
    ("reward", "measured"),
    [
        (REWARDS["exact"], "accuracy"),
        (REWARDS["f1"], "f1 (mean)"),
        (judge("quality"), "quality (mean)"),
        (lambda task, episode: 1.0, "<lambda> (mean)"),
    ],
)
def test_only_shares_of_right_answers_are_called_accuracy(reward: Any, measured: str) -> None:
    assert measured_name(reward) == measured
    result = {"accuracy": 0.5, "ci95": [0.4, 0.6], "num_tasks": 9}
    paired = {"difference": 0.1, "ci95": [0.05, 0.15]}
    evaluated = {"before": result, "after": result, "paired": paired}
    told = summary_table({**SUMMARY, "eval": evaluated, "measured": measured}, "runs/x")
    assert f"held-out {measured} " in _measured_in(told)


def test_differences_have_signs_and_means_have_none_in_every_table() -> None:
    paired = {"difference": 0.1, "ci95": [0.05, 0.15]}
    below = {"accuracy": -0.2, "ci95": [-0.3, 0.1], "num_tasks": 9, "paired": paired}
    assert accuracy_rows({"x": below}) == [
        ["x", "-0.200", "-0.300 .. 0.100", "9", "+0.100", "+0.050 .. +0.150"]
    ]
    assert (
        signed_interval([-0.1, 0.2]) == "-0.100 .. +0.200" and interval([0, 1]) == "0.000 .. 1.000"
    )


@pytest.mark.parametrize("columns", [50, 200])
def test_tables_are_as_wide_as_the_terminal_and_cut_nothing(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    word, many = "w" * 70, " ".join(["value"] * 60)
    told = table("title", ("name", "text"), [[word, many]], words=True)
    lines = told.splitlines()
    assert max(map(len, lines)) <= columns and "…" not in told
    assert told.count("w") == 70 and told.count("value") == 60
    assert columns < 100 or max(map(len, lines)) > 150
    monkeypatch.delenv("COLUMNS")
    assert max(map(len, table("title", ("a",), [[many]]).splitlines())) <= 110


def test_commands_are_quoted_and_take_the_flags() -> None:
    entry = {"trainable_parameters": 8, "sha256_before": "a" * 64, "sha256_after": "b" * 64}
    trained = {**SUMMARY, "policies": {"solver": entry}}
    told = summary_table(trained, "runs/my run", ["--system", "mine:Pair"], ["--meta", '{"c": 1}'])
    ablate, play = told.partition("next:\n")[2].splitlines()
    step = "runs/my run/checkpoints/step-000003"
    assert shlex.split(ablate, comments=True) == [
        *("marlora", "eval", step, "--ablate", "--system", "mine:Pair")
    ]
    assert shlex.split(play, comments=True) == [
        *("marlora", "play", step, "--system", "mine:Pair", "--meta", '{"c": 1}')
    ]
