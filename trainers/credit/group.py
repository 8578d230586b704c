"""Credit rules that compare answers with others of their group: GRPO and its relatives.

A group is the episodes that share `Episode.group`, or the turns a rule compares. A group without
signal (one member, or all equal) is left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from ...rollouts.types import TurnKey, groups
from .weights import (
    Advantages,
    CreditConfig,
    RewardedEpisodes,
    key_of,
    selected_turns,
    trainable,
    trainable_keys,
    turn_rewards,
)

# sums of the same rewards in another order differ by less than this
ROUNDING = 1e-12
HUGE = 1e100


def grpo(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = (R - mean) / (std + epsilon) over the episodes of one task (GRPO, arXiv:2402.03300).

    std is TRL's (n - 1); `scale_rewards` takes it over the group, the batch, or not at all;
    epsilon is `advantage_epsilon`.
    """
    batch_std = standard_deviation(batch.known_rewards or [0.0])
    return per_group(batch, lambda rewards: standardise(rewards, settings, batch_std))


def dr_grpo(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = R - mean over the episodes of one task (Dr. GRPO, arXiv:2503.20783)."""
    return per_group(batch, centre)


def rloo(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = R - mean of the other episodes of the task (RLOO, arXiv:2402.14740)."""
    return per_group(batch, leave_one_out)


def dr_mas(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = (R - mean) / (std + epsilon) over one agent's turns in a group (Dr. MAS,
    arXiv:2602.08847).

    Rewards of different scale, or agents that speak more often, then do not set the step size of
    the others. An agent's reward is its own, else the team's. Rows are turns: an episode in which
    it speaks twice counts twice, as in the authors' code.
    """
    rows: dict[tuple[str, str], dict[TurnKey, float]] = defaultdict(dict)
    for episode in batch.episodes:
        for turn in trainable(selected_turns(episode)):
            reward = batch.reward_of(episode, turn.agent, settings)
            if not math.isnan(reward):
                rows[episode.group, turn.agent][key_of(episode, turn)] = reward
    return per_rows(batch, rows, settings)


def at_grpo(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = (r - mean) / (std + epsilon) over the K answers sampled for one call, with
    r = team_weight r_team + r_own (AT-GRPO, arXiv:2510.11062). All K are trained.

    Both rewards are of the turn and sibling: `agent` None is the team's, else the agent's own.
    """
    rows: dict[tuple[str, int], dict[TurnKey, float]] = defaultdict(dict)
    for episode in batch.episodes:
        for turn in trainable(episode.turns) if episode.error is None else ():
            rewards = turn_rewards(episode, turn, settings)
            total = sum(
                settings.weight(r.name)
                * r.value
                * (settings.team_weight if r.agent is None else 1.0)
                for r in rewards
            )
            if rewards and math.isfinite(total):
                rows[episode.id, turn.index][key_of(episode, turn)] = total
    return per_rows(batch, rows, settings)


def per_group(batch: RewardedEpisodes, rule: Callable[[list[float]], list[float]]) -> Advantages:
    """One advantage per episode, to all its selected turns, by a rule from the known rewards [G] of
    a group to its advantages [G]."""
    advantages = Advantages()
    for group in groups(batch.episodes).values():
        scored = [e for e in group if not math.isnan(batch.rewards[e.id])]
        rewards = [batch.rewards[e.id] for e in scored]
        keys = [trainable_keys(e, selected_turns(e)) for e in scored]
        if constant(rewards):
            batch.in_constant_groups.update(key for own in keys for key in own)
            continue
        for own, advantage in zip(keys, rule(rewards), strict=True):
            advantages |= dict.fromkeys(own, advantage)
    return advantages


def per_rows(
    batch: RewardedEpisodes, rows: Mapping[tuple, Mapping[TurnKey, float]], settings: CreditConfig
) -> Advantages:
    """One advantage per turn, standardised inside each group of turns."""
    batch_std = standard_deviation(
        [reward for group in rows.values() for reward in group.values()] or [0.0]
    )
    advantages = Advantages()
    for group in rows.values():
        rewards = list(group.values())
        if constant(rewards):
            batch.in_constant_groups.update(group)
        else:
            advantages |= zip(group, standardise(rewards, settings, batch_std), strict=True)
    return advantages


def standardise(
    rewards: Sequence[float], settings: CreditConfig, batch_std: float = 0.0
) -> list[float]:
    """(R - mean) / (std + epsilon), or R - mean with `scale_rewards: none`."""
    if settings.scale_rewards == "none":
        return centre(rewards)
    mean = math.fsum(rewards) / len(rewards)
    std = batch_std if settings.scale_rewards == "batch" else standard_deviation(rewards)
    return [(reward - mean) / (std + settings.advantage_epsilon) for reward in rewards]


def centre(rewards: Sequence[float]) -> list[float]:
    """R - mean."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def leave_one_out(values: Sequence[float], counts: Sequence[float] | None = None) -> list[float]:
    """Each value minus the mean of the others, weighted by `counts` (of replays behind each value)
    if given."""
    counts = counts or [1.0] * len(values)
    total, mass = math.fsum(n * v for n, v in zip(counts, values, strict=True)), sum(counts)
    return [v - (total - n * v) / (mass - n) for n, v in zip(counts, values, strict=True)]


def standard_deviation(values: Sequence[float]) -> float:
    """With n - 1 below, as in TRL and verl; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    scale = max(map(abs, values))
    if scale > HUGE:  # squares would leave the range of floats
        return scale * standard_deviation([v / scale for v in values])
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def constant(values: Sequence[float]) -> bool:
    """Are there fewer than two different values? Asked before the mean is subtracted, and values
    that differ by rounding (0.1 + 0.2 and 0.3) are one, so that rounding makes no signal."""
    return len(values) < 2 or math.isclose(
        max(values), min(values), rel_tol=ROUNDING, abs_tol=ROUNDING
    )
