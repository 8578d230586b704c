"""Rewards of programs that were designed in turns, and the weights of reward-weighted regression
(W4S, arXiv:2504.04785). Pure Python."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....agents.seeds import derive_seed
from ....agents.settings import Settings, setting
from ....agents.types import SettingError
from ....rollouts.types import TurnKey


@dataclass
class DesignRewardConfig(Settings):
    """What a program is worth to the designer that wrote it."""

    reward: str = setting(
        "table: 1 above the best accuracy so far, 0.5 above that of the program before, else 0;"
        " continuous: (accuracy - best) / best",
        "table",
        choices=("table", "continuous"),
    )
    best_of: str = setting(
        "the best accuracy so far: of all programs that the chat shows (context), or of those that"
        " it began with (start, the authors' code)",
        "context",
        choices=("context", "start"),
    )
    low_accuracy: float = setting(
        "reward table: below this accuracy low_penalty is taken off", 0.3, at_least=0
    )
    low_penalty: float = setting("see low_accuracy", 0.1, at_least=0)
    min_accuracy: float = setting(
        "a program of this accuracy or less is left out; below 0: none", 0.05, at_most=1
    )


@dataclass
class RewardWeightConfig(Settings):
    """The weights with which programs are imitated."""

    tau: float = setting("temperature of the weights exp(reward / tau)", 0.4, above=0)
    weights: str = setting(
        "exp(reward / tau) (reward), or as controls the same for all (constant), or those weights"
        " dealt out at random (random)",
        "reward",
        choices=("reward", "constant", "random"),
    )
    normalize_weights: bool = setting(
        "divide the weights by their mean; false: as they are, a larger step (the authors' code)",
        True,
    )
    loss_average: str = setting(
        "a program counts by the mean over its tokens (sample, the authors' code), or by their sum"
        " (token, the paper's log-probability)",
        "sample",
        choices=("sample", "token"),
    )
    trained_turns: str = setting(
        "a program's weight trains its own turn (last), or also the earlier turns of its chat (all,"
        " the authors' code)",
        "last",
        choices=("last", "all"),
    )


def design_reward(
    accuracy: float, best: float, previous: float, config: DesignRewardConfig
) -> float:
    """The reward of a program of this accuracy, after programs of the accuracies `best` (the
    highest so far) and `previous` (of the one before it)."""
    if config.reward == "continuous":
        return (accuracy - best) / best if best else 1.0
    value = 1.0 if accuracy > best else 0.5 if accuracy > previous else 0.0
    return value - config.low_penalty if accuracy < config.low_accuracy else value


@dataclass(frozen=True)
class RewardedChat:
    """A chat up to one program: the turns that wrote it and those before it, and its reward.

    turns: keys of turns, the program's own last.
    """

    turns: tuple[TurnKey, ...]
    reward: float


def reward_weights(rewards: Sequence[float], config: RewardWeightConfig, seed: int) -> list[float]:
    """exp(r / tau) of each reward, divided by their mean if they are normalised; or what the
    setting `weights` has in their place. Raises `SettingError` for weights beyond a float."""
    if not rewards:
        return []
    if config.weights == "constant":
        return [1.0] * len(rewards)
    # the highest is taken out of the exponent, where only ratios count
    top = max(rewards) if config.normalize_weights else 0.0
    try:
        weights = [math.exp((reward - top) / config.tau) for reward in rewards]
    except OverflowError as error:
        raise SettingError(
            f"tau: exp({max(rewards):g} / {config.tau:g}) is beyond any number; set it higher, or"
            " normalize_weights: true"
        ) from error
    if config.normalize_weights:
        mean = math.fsum(weights) / len(weights)
        weights = [weight / mean for weight in weights]
    if config.weights == "random":
        random.Random(derive_seed(seed, "w4s", "weights")).shuffle(weights)
    return weights


def turn_weights(
    chats: Sequence[RewardedChat],
    lengths: Mapping[TurnKey, int],
    config: RewardWeightConfig,
    seed: int,
) -> dict[TurnKey, float]:
    """The weight of every turn in -sum(weight x log p) / tokens. With `loss_average: sample` that
    is the mean over chats of w x CE, the mean of -log p over the chat's trained tokens; with
    `token` the sum over all their tokens of -w x log p, over the number of these tokens.

    A turn that several chats hold has the sum of their weights: the gradient is that of the chats
    one by one. `lengths`: tokens of each turn, at least 1.
    """
    trained = [c.turns if config.trained_turns == "all" else c.turns[-1:] for c in chats]
    sizes = [sum(lengths[key] for key in turns) for turns in trained]
    once = sum(lengths[key] for key in {key for turns in trained for key in turns})
    mean = once / max(len(sizes), 1)
    weights: dict[TurnKey, float] = {}
    values = reward_weights([chat.reward for chat in chats], config, seed)
    for turns, size, value in zip(trained, sizes, values, strict=True):
        share = mean / size if config.loss_average == "sample" else once / sum(sizes)
        for key in turns:
            weights[key] = weights.get(key, 0.0) + value * share
    return weights
