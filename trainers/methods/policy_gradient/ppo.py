"""PPO for a team: every agent's turns are judged token by token against what a critic expected,
and each policy learns from the surprise.

One step plays `tasks_per_step` tasks, gives every turn a reward (`credit`: the agent's own or the
team's, or of the turn), lets a critic per policy (a scalar head on the shared base,
`scalar_heads.py`) say what it expects before each token, and turns both into advantages (`gae.py`).
Then policies and critics learn from them in several epochs of minibatches. Against the paper
(arXiv:1707.06347):

- Behaviour log-probabilities are the engine's, so there is no old-log-prob forward: the ratio and
  its clipping are `policy_loss`.
- Policy and critic share the frozen base and no weights, so each has its own optimizer, and no
  coefficient weighs one loss against the other.
- The KL to the reference (the policy as the run began: the base with adapters off, unless it has
  an `init`) is part of the token rewards (`kl_coef`), or of the loss (`beta`).
- Where every n-th turn of an agent has the same ahead of it in all episodes (rewards all 0, or all
  1), whitening would blow the critic's errors up to advantages: such turns teach the critic only.

accelerate launch recipes/ppo_team.py [--config recipes/ppo_team.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ....agents.seeds import derive_seed
from ....agents.settings import Settings, setting
from ....agents.types import SettingError, Turn
from ....rollouts.types import Episode, TurnKey
from ...batching.samples import Denominators, samples
from ...config import OptimizerSettings, RunConfig
from ...credit.rules import credit
from ...credit.weights import CreditConfig, key_of, selected_turns, trainable_keys
from ...trainer import Trainer
from ...update.gae import explained_variance
from ...update.losses.inputs import LossInputs
from ...update.losses.policy_gradient import LossConfig, policy_loss
from ...update.losses.statistics import Stats
from ...update.losses.value import value_loss
from ...update.minibatches import merge_results, minibatches
from ...update.optimizer_step import UpdateOptions, UpdateResult
from ...update.scalar_heads import HeadSpec, Targets
from .critics import CriticBatch, CriticConfig, critic_batch, critic_of, critics

T = TypeVar("T")

# rules of `credit` that compare nothing: the critic is the baseline
REWARDS = ("agent", "team", "turn")


@dataclass
class PPOSettings(Settings):
    """Passes and updates of PPO over a step's episodes. To come before `CreditConfig` among the
    parents of a config: `credit` gives each turn its reward. Names are those that TRL's PPO had."""

    credit: str = setting(
        "reward of a turn: agent (its own, else the team's), team (discounted), turn (returns of"
        " turns' rewards); ppo has a critic for a baseline, so no rule that compares episodes",
        "agent",
        choices=REWARDS,
    )
    num_ppo_epochs: int = setting("passes over a step's episodes", 4, at_least=1)
    num_mini_batches: int = setting(
        "updates of each policy and of each critic per pass", 1, at_least=1
    )
    target_kl: float = setting(
        "a policy's passes end once it is this far from the one that played, in nat per token; 0"
        " never",
        0.0,
        at_least=0,
    )


def check_iterations(settings: OptimizerSettings) -> None:
    """Refuse `num_iterations`: PPO repeats its updates by `num_ppo_epochs`."""
    if settings.num_iterations != 1:
        raise SettingError(
            f"num_iterations: 1 expected, got {settings.num_iterations}; ppo repeats its updates by"
            " num_ppo_epochs"
        )


@dataclass
class PPOConfig(RunConfig, PPOSettings, CreditConfig, CriticConfig, LossConfig):
    """`RunConfig` with the rewards of turns (`CreditConfig`), critics (`CriticConfig`), the clipped
    loss (`LossConfig`) and the passes of PPO (`PPOSettings`)."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/ppo"
    )

    def check(self) -> None:
        check_iterations(self)


class PPOTrainer(Trainer[PPOConfig]):
    """Trains a team by PPO. Arguments: see `Trainer`.

    trainer = PPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["solver", "reviewer"]),
                         tasks="gsm8k", args=PPOConfig(output_dir="runs/ppo"))
    trainer.train()
    """

    Config = PPOConfig
    ratios = True

    def heads(self) -> Sequence[HeadSpec]:
        return critics(self.spec.system.specs, self.spec.policies, self.args)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Policies and critics learn from the step's episodes; returns metrics."""
        rewards = turn_rewards(episodes, self.args, self.run.learner.policy_of)
        return ppo_step(self, step, episodes, rewards)


def turn_rewards(
    episodes: Sequence[Episode], config: PPOConfig, policy_of: Mapping[str, str] | None = None
) -> dict[TurnKey, float]:
    """The reward of each turn, by `config.credit`. A turn that is missing is not learnt from.

    Where turns end a sequence each, a turn has all it is held to account for. In one sequence of an
    agent's turns (`across_turns`) it is what comes in after that turn and before the agent's next
    one that is trained: its own rewards, those of turns that cannot be trained (empty, written,
    T = 0, saw the answer), and with the agent's last turn those of the agent or team.

    `policy_of`: agent -> policy that learns; None takes each agent's own.
    """
    if not config.across_turns:
        return credit(episodes, config)
    if policy_of is None:
        policy_of = {t.agent: t.policy or t.agent for e in episodes for t in e.turns}
    rule = {"turn_clock": "own", "discount": 0.0} if config.credit == "turn" else {"discount": 1.0}
    everyone = [dataclasses.replace(e, turns=tuple(map(_as_sampled, e.turns))) for e in episodes]
    earned = credit(everyone, dataclasses.replace(config, **rule))
    sequences, _ = samples(episodes, dict.fromkeys(earned, 1.0), policy_of)
    trained = {key for sequence in sequences for key in sequence.keys}
    asked = {key for e in episodes for key in trainable_keys(e, selected_turns(e))}
    rewards = {key: 0.0 for key in earned if key in asked}  # also those that `samples` leaves out
    for episode in episodes:
        taken = {turn.agent: key_of(episode, turn) for turn in selected_turns(episode)}
        before: dict[str, TurnKey] = {}
        for turn in selected_turns(episode):
            key = key_of(episode, turn)
            if key in trained:
                before[turn.agent] = key
            counts = config.credit == "turn" or key == taken[turn.agent]
            if counts and key in earned and turn.agent in before:
                rewards[before[turn.agent]] += earned[key]
    return rewards


def _as_sampled(turn: Turn) -> Turn:
    """The turn as if it could be trained, so that a credit rule says what came in with it."""
    return dataclasses.replace(turn, source="sampled", saw_gold=False)


def ppo_step(
    trainer: Trainer[Any], step: int, episodes: Sequence[Episode], rewards: Mapping[TurnKey, float]
) -> dict[str, Any]:
    """One step of PPO from these rewards of turns; returns the step's metrics. For any trainer
    whose config is a `PPOConfig` and whose heads are `critics`.

    A turn whose reward is missing or NaN is read as context and not learnt from.
    """
    learner, config = trainer.run.learner, trainer.args
    scores = {key: float(reward) for key, reward in rewards.items() if math.isfinite(reward)}
    found, dropped = samples(episodes, dict.fromkeys(scores, 1.0), learner.policy_of)
    if step == 1 and found:
        learner.show(found)
    lesson = critic_batch(
        learner, episodes, found, scores, critic_of(learner.policy_of, episodes, config), config
    )
    judged = learn_critics(trainer, step, lesson)
    done = learn_policies(trainer, step, lesson)
    rows = trainer.rows(merge_results(done), episodes)
    for policy, row in rows.items():
        mine = lesson.tokens_of(policy)
        row["updates"] = sum(policy in update for update in done)
        if len(mine):
            row |= lesson_row(lesson, mine)
    return {
        "policies": rows,
        "critics": {name: critic_row(lesson, name, update) for name, update in judged.items()},
        "dropped": {
            f"{agent}: {reason}": count for (agent, reason), count in sorted(dropped.items())
        },
    }


def learn_policies(
    trainer: Trainer[Any], step: int, lesson: CriticBatch
) -> list[dict[str, UpdateResult]]:
    """Every policy's updates, in order. One that is `target_kl` away from the policy that played,
    or not finite, has no more of them.

    The distance is measured in the pass of an update, so that update is the last one.
    """
    config: PPOConfig = trainer.args
    done: list[dict[str, UpdateResult]] = []
    taught = lesson.taught(always=bool(config.beta or config.entropy_coef))
    how = UpdateOptions(reference=config.beta > 0, entropy_grad=bool(config.entropy_coef))

    def loss(inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
        return policy_loss(inputs, config)

    plans = {
        policy: list(_minibatches([s for s in taught if s.policy == policy], config, step, policy))
        for policy in sorted({sample.policy for sample in taught})
    }
    while plans:
        update = trainer.run.learner.learn(
            step, [sample for plan in plans.values() for sample in plan.pop(0)], loss, how
        )
        done.append(update)
        far = {
            policy
            for policy, result in update.items()
            if not result.applied
            or (config.target_kl and result.stats["mismatch_kl"] > config.target_kl)
        }
        plans = {policy: plan for policy, plan in plans.items() if plan and policy not in far}
    return done


def learn_critics(trainer: Trainer[Any], step: int, lesson: CriticBatch) -> dict[str, UpdateResult]:
    """Every critic's updates towards the returns; what they did together, by name."""
    config: PPOConfig = trainer.args
    found: dict[str, UpdateResult] = {}

    def loss(
        scores: torch.Tensor, targets: Targets, counts: Denominators
    ) -> tuple[torch.Tensor, Stats]:
        return value_loss(
            scores, targets["values"], targets["returns"], config.cliprange_value, counts
        )

    for name in lesson.critics:
        done = []
        for batch in _minibatches(lesson.judged_by(name), config, step, name):
            tokens = torch.cat([numbers for _, numbers in batch])
            targets = {"values": lesson.values[tokens], "returns": lesson.returns[tokens]}
            done.append(
                {
                    name: trainer.run.learner.learn_head(
                        step, name, [sample for sample, _ in batch], targets, loss
                    )
                }
            )
        found |= merge_results(done)
    return found


def _minibatches(items: Sequence[T], config: PPOConfig, step: int, name: str) -> Iterator[list[T]]:
    size = max(1, math.ceil(len(items) / config.num_mini_batches))
    return minibatches(
        items, size, config.num_ppo_epochs, derive_seed(config.seed, "ppo", step, name)
    )


def lesson_row(lesson: CriticBatch, tokens: torch.Tensor) -> dict[str, float]:
    """What the critics knew of these tokens before the step: their mean word, the variance they
    explain, half their mean squared error."""
    values, returns = lesson.values[tokens], lesson.returns[tokens]
    return {
        "value": float(values.mean()),
        "explained_variance": explained_variance(values, returns),
        "value_loss": 0.5 * float(((values - returns) ** 2).mean()),
        "kl_reward": float(lesson.kl[tokens].mean()),
    }


def critic_row(lesson: CriticBatch, name: str, update: UpdateResult) -> dict[str, Any]:
    """One critic's row of the step's metrics: `lesson_row`, and its last update."""
    return {
        **lesson_row(lesson, lesson.tokens(name)),
        "tokens": update.tokens,
        "learning_rate": update.learning_rate,
        "grad_norm": update.grad_norm,
        "applied": update.applied,
        "value_loss_after": update.stats.get("loss"),
        "value_clipped": update.stats.get("value_clipped"),
    }
