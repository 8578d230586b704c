"""A run that learnt nothing is told from its metrics, with the cause and the setting to change."""

from __future__ import annotations

from typing import Any

import pytest

from marlora.rollouts.report.findings import learnt_nothing, settings_to_change

CONFIG = {
    "max_completion_length": 16,
    "num_generations": 8,
    "temperature": 0.7,
    "learning_rate": 1e-4,
    "num_iterations": 1,
    "tasks": "gsm8k",
    "rewards": ["exact"],
    "credit": "grpo",
}
LEARNT = {"tokens": 9, "applied": True, "constant_groups": 0.5, "learning_rate": 1e-4}
CONSTANT = {"tokens": 0, "truncated": 0.0, "constant_groups": 1.0}


def row(low: float = 0.0, high: float = 1.0, **policies: Any) -> dict[str, Any]:
    return {"reward_min": low, "reward_max": high, "policies": policies}


def test_one_step_with_a_signal_is_enough_and_no_step_is_no_finding() -> None:
    assert learnt_nothing([row(a=CONSTANT), row(a=LEARNT)], CONFIG) == ""
    assert learnt_nothing([], CONFIG) == ""
    assert learnt_nothing([{"policies": {}}], CONFIG) == ""
    assert learnt_nothing([{"verifier": {"updates": 3}, **row(a={"tokens": 0})}], CONFIG) == ""


@pytest.mark.parametrize(
    ("rows", "changes", "why"),
    [
        (
            [row(0, 0, a=CONSTANT)],
            {},
            "every episode got reward 'exact': 0; the reward may not fit",
        ),
        (
            [row(1, 1, a=CONSTANT)] * 2,
            {},
            "every episode got reward 'exact': 1; the tasks may be too",
        ),
        (
            [row(0, 0, a={**CONSTANT, "truncated": 1.0})],
            {},
            "share 1.00): raise max_completion_length from 16",
        ),
        (
            [row(0, 0, a={**CONSTANT, "truncated": 1.0})],
            {"agents": {"a": {"sampling": {"max_tokens": 4}}}},
            "agents.a.sampling.max_tokens from 4",
        ),
        ([row(a=CONSTANT)], {}, "raise num_generations from 8 or temperature from 0.7"),
        ([row(a=CONSTANT)], {"num_generations": 1}, "raise num_generations from 1"),
        ([row(a={**LEARNT, "learning_rate": 0.0})], {}, "learning_rate was 0"),
        ([row(a={**LEARNT, "applied": False})], {}, "no update was finite"),
        ([row(a={"tokens": 0, "truncated": 0.1})], {}, "success_threshold"),
        # trained by its KL term only, or by PPO, which compares no groups: all groups constant
        ([row(a={**LEARNT, "constant_groups": 1.0})], {}, "raise num_generations"),
        ([row(0, 0, a={"tokens": 9})], {}, "reward 'exact': 0"),
        ([row(0, 0, a=CONSTANT), row(1, 1, a=CONSTANT)], {}, "raise num_generations from 8"),
    ],
)
def test_each_cause_names_its_setting(
    rows: list[dict[str, Any]], changes: dict[str, Any], why: str
) -> None:
    told = learnt_nothing(rows, {**CONFIG, **changes})
    assert told.startswith("This run learnt nothing: ") and why in told


def test_equal_metrics_do_not_hide_what_other_rewards_taught() -> None:
    rows = [row(0, 0, a=LEARNT)]
    assert learnt_nothing(rows, {**CONFIG, "rewards": ["exact", "f1"]}) == ""
    assert learnt_nothing(rows, {**CONFIG, "credit": None}) == ""  # imitation needs no difference


def test_of_a_team_the_policy_that_learnt_nothing_is_named() -> None:
    told = learnt_nothing([row(a=LEARNT, b={**CONSTANT, "truncated": 1.0})], CONFIG)
    assert told.startswith(
        "Part of the team learnt nothing: policy 'b': its replies were truncated"
    )
    assert "'a'" not in told


def test_settings_of_alarms_have_their_values() -> None:
    assert settings_to_change(CONFIG)["truncated"] == "raise max_completion_length from 16"
    assert settings_to_change(CONFIG).keys() == {
        "truncated",
        "constant_groups",
        "clipped",
        "entropy",
        "mismatch",
    }
