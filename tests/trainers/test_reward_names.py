"""Names in `reward_weights` are checked: before the run where they are known, else in its first
step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Reward, SettingError, Task
from marlora.rollouts.rewards.actor_critic import roles
from marlora.rollouts.rewards.names import has_known_names, names_given
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.credit.weights import CreditConfig, RewardWeights
from marlora.trainers.errors import RunError
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.small_run import config

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder: Path, model: Path, rewards: list[Any], **changes: Any) -> GRPOTrainer:
    return GRPOTrainer(
        system=tiny_chain(),
        tasks=tiny_tasks()[:8],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=rewards,
        args=config(folder, model, max_steps=1, **changes),
    )


def mine(task: Task, episode: Episode) -> list[Reward]:
    return [Reward("bonus", float(len(episode.output or "") % 3))]


def misnamed(task: Task, episode: Episode) -> list[Reward]:
    return [Reward("misnamed", 1.0, agent="frist")]


@pytest.mark.parametrize(
    ("rewards", "weights", "why"),
    [
        (["correct"], {"corect": 1.0}, "reward_weights.corect: .*did you mean 'correct'"),
        (["correct", "format"], {"correct": 1.0, "fromat": 0.1}, "fromat: .*'format'"),
        (["correct", roles], {"correct": 1, "roles": 1}, "reward_weights.roles: .*'role'"),
        (["correct", "verified(calculator)"], {"verified": 1}, "did you mean 'verifier'"),
        (["correct"], {"correct": 1, "exact": 0.0}, "reward_weights.exact"),
        (["correct"], {"correct": 1, "counterfactual": 1}, "reward_weights.counterfactual"),
    ],
)
def test_a_weight_of_no_reward_is_refused_before_the_run(
    tmp_path: Path, rewards: list[Any], weights: dict[str, float], why: str
) -> None:
    with pytest.raises(SettingError, match=why):
        trainer(tmp_path / "run", tmp_path, rewards, reward_weights=weights)


def test_weights_of_rewards_that_are_given_are_taken(tmp_path: Path) -> None:
    for rewards, weights, more in (
        (["correct", roles], {"correct": 1, "role": 1}, {}),
        (["correct"], {"counterfactual": 1.0}, {"credit": "counterfactual"}),
        (["correct", mine], {"bonus": 1.0}, {}),
        (["correct", "posted"], {"style": 1.0}, {}),  # named by what posts it
        (["correct", "workflow"], {"performance": 1.0}, {}),
    ):
        made = trainer(tmp_path / "run", tmp_path, rewards, reward_weights=weights, **more)
        assert made.args.reward_weights == weights


@pytest.mark.parametrize("wrong", ["bonsu", "mine"])
def test_a_weight_of_what_a_function_of_the_users_never_gives_ends_the_first_step(
    tmp_path: Path, model: Path, wrong: str
) -> None:
    made = trainer(tmp_path / "run", model, ["exact", mine], reward_weights={"exact": 1, wrong: 1})
    with pytest.raises(SettingError, match=rf"reward_weights\.{wrong}: .*first step.*bonus"):
        made.train()


def test_rewards_that_name_nobody_end_the_run_at_its_first_step(
    tmp_path: Path, model: Path
) -> None:
    made = trainer(tmp_path / "run", model, ["exact", misnamed])
    with pytest.raises(RunError, match=r"no episode could be scored.*'frist': no such agent"):
        made.train()
    assert made.run.step == 0


def test_names_that_functions_are_known_to_give() -> None:
    assert names_given([roles, mine]) == {"role", "mine"}
    assert has_known_names(roles) and not has_known_names(mine)


@pytest.mark.parametrize("name", ["length", "format", "valid", "ran", "counterfactual"])
def test_rewards_for_metrics_weigh_nothing_unless_given_a_weight(name: str) -> None:
    assert RewardWeights().weight(name) == 0.0 and CreditConfig().weight(name) == 0.0
    assert RewardWeights(reward_weights={name: 0.5}).weight(name) == 0.5
