"""GRPO for a team: every episode of a task is compared with its siblings, and each agent's own
tokens learn from the comparison.

One step plays `tasks_per_step` tasks `num_generations` times, turns rewards into one advantage per
turn (`credit`, see `credit/rules.py`), drops what has no gradient, and updates each agent's
adapter on exactly the tokens it sampled (loss: `losses/policy_gradient.py`), over all the tokens
that were compared, whether their advantage is 0 or not. Against the paper
(arXiv:2402.03300): behaviour log-probabilities are the engine's, so there is no old-log-prob
forward; no KL term unless `beta` > 0; statistics run over whatever the credit rule compares, by
default the team's reward over episodes of one task.

accelerate launch recipes/grpo_team.py [--config recipes/grpo_team.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.types import Episode, TurnKey
from ...config import RunConfig
from ...credit.counterfactual import counterfactual_rewards
from ...credit.rules import credit
from ...credit.weights import CreditConfig
from ...trainer import Trainer
from ...update.losses.inputs import LossFn, LossInputs
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ...update.losses.statistics import Stats
from ...update.policy_batch import policy_batch


@dataclass
class GRPOConfig(RunConfig, CreditConfig, LossConfig):
    """`RunConfig` with a credit rule (`CreditConfig`) and a policy-gradient loss (`LossConfig`)."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/grpo"
    )

    def check(self) -> None:
        check_group_size(self.num_generations, self.credit)


def check_group_size(num_generations: int, rule: str) -> None:
    """Refuse groups of one episode for credit rules that compare episodes of a task."""
    if num_generations < 2 and rule in ("grpo", "rloo", "dr_grpo", "dr_mas"):
        raise SettingError(
            f"num_generations: credit {rule!r} compares episodes of one task, so at least 2; got"
            f" {num_generations}"
        )


class GRPOTrainer(Trainer[GRPOConfig]):
    """Trains a team by policy gradient. Arguments: see `Trainer`.

    trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["solver", "reviewer"]),
                          tasks="arithmetic", args=GRPOConfig(output_dir="runs/first"))
    trainer.train()
    print(trainer.evaluate())
    """

    Config = GRPOConfig
    ratios = True

    def collect(self, step: int) -> list[Episode]:
        replay = self.replay if self.args.credit == "counterfactual" else None
        return self.run.rollouts.collect(step, replay)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One update from the step's episodes; returns metrics."""
        return policy_gradient(self, step, episodes, self.loss)

    async def replay(self, episode: Episode) -> Episode:
        """The episode with counterfactual rewards, from replays of each turn by the team that
        played it."""
        player = dataclasses.replace(self.run.rollouts.player(episode.state), recorded=False)
        return await counterfactual_rewards(player, episode, self.args)

    def loss(self, inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
        """The policy-gradient loss that every policy's update minimises."""
        return policy_loss(inputs, self.args)


def policy_gradient(
    trainer: Trainer[Any], step: int, episodes: Sequence[Episode], loss: LossFn
) -> dict[str, Any]:
    """Credit for a step's episodes, one update of every policy from it, and the step's metrics."""
    learner, config = trainer.run.learner, trainer.args
    in_constant_groups: set[TurnKey] = set()
    advantages = credit(episodes, config, learner.credit_state, in_constant_groups)
    found, dropped, how = policy_batch(
        episodes, advantages, in_constant_groups, learner.policy_of, config, learner.trainable
    )
    if step == 1 and found:
        learner.show(found)
    done = learner.learn(step, found, loss, how)
    return {
        "policies": trainer.rows(done, episodes, advantages),
        "dropped": {
            f"{agent}: {reason}": count for (agent, reason), count in sorted(dropped.items())
        },
    }
