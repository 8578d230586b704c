"""What a run is, before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError, Task
from marlora.rollouts.rewards.builtin import correct, right, workflow
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.spec import RunSpec

TASKS = [Task(f"t{n}", f"{n}?", "!") for n in range(5)]


def spec(folder: Path, **changes: object) -> RunSpec:
    config = RunConfig(output_dir=str(folder), model="m", num_eval_tasks=2, tasks_per_step=2)
    given: dict = dict(tasks=TASKS[:2], eval_tasks=TASKS[2:], rewards=[correct])
    return RunSpec.resolve(config, Chain(["a", "b"]), **(given | changes))


def test_rewards_of_the_method_come_after_those_of_the_settings_and_once(tmp_path: Path) -> None:
    found = spec(tmp_path, extra_rewards=[workflow, correct])
    assert found.rewards == [correct, workflow] and found.metric == "correct"
    found = spec(tmp_path, rewards=None, extra_rewards=["right", "correct"])
    assert found.rewards == [correct, right] and found.config.rewards == ["correct", "right"]


def test_agents_policies_and_held_out_tasks_follow_from_the_settings(tmp_path: Path) -> None:
    found = spec(tmp_path)
    assert found.agents_of == {"a": ["a"], "b": ["b"]} and found.policies.keys() == {"a", "b"}
    assert found.eval_tasks == TASKS[2:4] and found.tasks_given
    assert {task.id for task in found.tasks_of(1)} == {"t0", "t1"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.recipe = "other"  # type: ignore[misc]


def test_tasks_that_are_given_need_held_out_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="eval_tasks: the training tasks are given as a list"):
        spec(tmp_path, eval_tasks=None)
    with pytest.raises(SettingError, match="held-out tasks are also trained on"):
        spec(tmp_path, eval_tasks=TASKS[1:])
    with pytest.raises(SettingError, match="rewards: empty"):
        spec(tmp_path, rewards=[])
