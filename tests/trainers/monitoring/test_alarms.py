"""Alarms by hand-made rows: what is watched, from where on, and when a run ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from marlora.agents.types import Task, Turn
from marlora.rollouts.report.findings import settings_to_change
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.monitoring.alarms import Alarms
from marlora.trainers.trainer import calls_of, shares_of

GOOD = {
    "tokens": 9,
    "first_mismatch_kl": 1e-5,
    "clipped": 0.5,
    "truncated": 0.5,
    "constant_groups": 0.9,
    "entropy": 0.01,
}


def alarms(monitor: Alarms | None = None, **changes: Any) -> tuple[list[str], str]:
    return (monitor or Alarms()).check({"solver": {**GOOD, **changes}})


def test_at_the_bounds_there_is_no_alarm() -> None:
    assert alarms() == ([], "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clipped": 0.51}, "policy 'solver': clipped 0.51 (above 0.5)"),
        ({"truncated": 0.6}, "policy 'solver': truncated 0.60 (above 0.5)"),
        ({"constant_groups": 0.95}, "policy 'solver': constant groups 0.95 (above 0.9)"),
        (
            {"entropy": 0.009},
            (
                "policy 'solver': entropy 0.0090 nat per token (below 0.01): it hardly explores any"
                " more"
            ),
        ),
    ],
)
def test_each_share_has_its_alarm(changes: dict[str, float], told: str) -> None:
    assert alarms(**changes) == ([told], "")


def test_a_policy_that_learnt_nothing_is_not_judged() -> None:
    assert alarms(tokens=0, clipped=1.0, entropy=0.0) == ([], "")


def test_mismatch_is_compared_with_the_noise_of_the_first_step() -> None:
    quiet, noisy = Alarms(), Alarms()
    alarms(quiet, first_mismatch_kl=1e-6)
    alarms(noisy, first_mismatch_kl=4e-4)  # bfloat16, say
    assert alarms(quiet, first_mismatch_kl=2e-3)[0] == [
        "policy 'solver': engine and trainer disagree by 2.0e-03 nat per token (k3 KL); it was"
        " 1.0e-06 at the start"
    ]
    assert alarms(noisy, first_mismatch_kl=2e-3) == ([], "")  # less than ten times its own


def test_a_mismatch_from_the_first_step_on_is_no_noise() -> None:
    monitor = Alarms()
    told = [alarms(monitor, first_mismatch_kl=0.3) for _ in range(3)]
    assert all(len(warnings) == 1 and "disagree by 3.0e-01" in warnings[0] for warnings, _ in told)
    assert [bool(reason) for _, reason in told] == [False, False, True]


def test_three_steps_beyond_all_bounds_end_the_run_and_two_do_not() -> None:
    monitor = Alarms()
    alarms(monitor)
    for stops in (False, False):
        assert bool(alarms(monitor, first_mismatch_kl=0.05)[1]) is stops
    assert alarms(monitor)[1] == ""  # a good step in between begins the count anew
    seen = []
    for _ in range(3):
        monitor = Alarms(**monitor.to_json())  # the count goes through a checkpoint
        seen.append(alarms(monitor, first_mismatch_kl=0.05)[1])
    assert seen[:2] == ["", ""] and seen[2].startswith(
        "policy 'solver': engine and trainer disagreed by 5.0e-02 nat per token for 3 steps"
    )


def test_shares_of_cut_off_turns_and_silent_groups_by_hand() -> None:
    def episode(number: int, group: str, *reasons: str) -> Episode:
        turns = [
            Turn(i, agent, finish_reason=reason)
            for i, (agent, reason) in enumerate(zip("ab", reasons, strict=True))
        ]
        return Episode(f"e{number}", group, Task(group, ""), turns=tuple(turns))

    episodes = [
        episode(0, "g", "length", "stop"),
        episode(1, "g", "stop", "stop"),
        episode(2, "h", "stop", "length"),
    ]
    advantages = {("e0", 0, 0): 1.0, ("e1", 0, 0): -1.0, ("e2", 0, 0): 0.0, ("e2", 1, 0): 2.0}
    assert shares_of(episodes, ["a"], advantages) == {"truncated": 1 / 3, "constant_groups": 0.5}
    assert shares_of(episodes, ["b"], advantages) == {"truncated": 1 / 3, "constant_groups": 0.5}
    assert shares_of(episodes, ["a", "b"], advantages) == {
        "truncated": 2 / 6,
        "constant_groups": 0.0,
    }
    assert shares_of([], ["a"], {}) == {"truncated": 0.0, "constant_groups": 0.0}


@pytest.mark.parametrize("share", ["truncated", "constant_groups"])
@pytest.mark.parametrize("value", [0.95, 1.0])
@pytest.mark.parametrize("update", [{}, {"tokens": 0}, {"applied": False}])
def test_shares_of_a_steps_episodes_warn_up_to_their_end(
    share: str, value: float, update: dict[str, Any]
) -> None:
    """At 1.0 there is nothing to train on, so the row holds no update."""
    (warning,), stop = alarms(**{share: value}, **update)
    assert f"{share.replace('_', ' ')} {value:.2f}" in warning and not stop


def test_a_row_without_an_update_holds_no_more_than_its_shares() -> None:
    row = {"tokens": 0, "truncated": 1.0, "constant_groups": 1.0}
    warnings, stop = Alarms().check({"solver": row})
    assert len(warnings) == 2 and not stop


def test_clipped_and_entropy_warn_at_their_ends() -> None:
    assert len(alarms(clipped=1.0, entropy=0.0)[0]) == 2


def test_warnings_name_the_setting_and_its_value() -> None:
    advice = settings_to_change({"max_completion_length": 16, "num_generations": 4})
    row = {"tokens": 0, "truncated": 1.0, "constant_groups": 1.0}
    cut_off, silent = Alarms().check({"solver": row}, advice=advice)[0]
    assert "truncated 1.00: raise max_completion_length from 16" in cut_off
    assert "constant groups 1.00: raise num_generations from 4" in silent


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"layout": "auto", "dtype": "auto", "engine": "vllm"},
            "change layout from auto to padded or dtype from auto to float32 or engine from vllm to"
            " transformers to find out which of them computes otherwise",
        ),
        (
            {"layout": "padded", "dtype": "auto", "engine": "transformers"},
            "change dtype from auto to float32 to find out which of them computes otherwise",
        ),
        (
            {"layout": "padded", "dtype": "float32", "engine": "transformers"},
            "set proof_every to 1 to prove every published version",
        ),
    ],
)
def test_a_mismatch_names_the_settings_to_change(config: dict[str, str], told: str) -> None:
    monitor, advice = Alarms(), settings_to_change(config)
    seen = [
        monitor.check({"solver": {**GOOD, "first_mismatch_kl": 0.3}}, advice=advice)
        for _ in range(3)
    ]
    assert all(warning.endswith(f"at the start; {told}") for (warning,), _ in seen)
    assert seen[2][1].endswith(f"is not the trained one; {told}")


def test_the_settings_that_a_mismatch_names_exist() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    assert {"layout", "dtype", "engine", "proof_every"} <= fields


def test_calls_per_episode_by_hand() -> None:
    """Two episodes: a speaks twice and once more in a child, b once with two siblings."""
    turns = (Turn(0, "a"), Turn(1, "b"), Turn(1, "b", sibling=1), Turn(2, "a"))
    episodes = [
        Episode("e0", "g", Task("t", ""), turns=turns),
        Episode("e0/child", "g", Task("t", ""), turns=(Turn(0, "a"),), parent="e0"),
        Episode("e1", "g", Task("t", "")),
    ]
    assert calls_of(episodes, ["a"]) == {"calls_per_episode": 1.5}
    assert calls_of(episodes, ["b"]) == {"calls_per_episode": 0.5}
    assert calls_of(episodes, ["a", "b"]) == {"calls_per_episode": 2.0}
    assert calls_of([], ["a"]) == {}
