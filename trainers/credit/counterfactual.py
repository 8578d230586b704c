"""Counterfactual rewards: what a turn was worth, measured by replays of the episode without it.

Everything before the turn is given, the turn is replaced, the rest of the team answers anew.
Replays are scored and forgotten: they are never trained on. The credit rule `counterfactual` turns
these rewards into advantages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

from ...agents.seeds import derive_seed
from ...agents.state import TeamState
from ...agents.types import Completion, Decision, Reward, SettingError, Turn
from ...rollouts.episodes.runner import EpisodeRequest
from ...rollouts.types import Episode
from .group import leave_one_out
from .weights import (
    Advantages,
    CreditConfig,
    RewardedEpisodes,
    team_rewards,
    trainable,
    trainable_keys,
)

log = logging.getLogger(__name__)


def counterfactual(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = the turn's reward named `counterfactual`, which `counterfactual_rewards` put on episodes.

    Difference rewards, or C3 (arXiv:2603.06859) where one call has several answers; then all of
    them are trained.
    """
    advantages = Advantages()
    for episode in batch.episodes:
        keys = set(trainable_keys(episode, episode.turns)) if episode.error is None else set()
        for r in episode.rewards:
            if (
                r.name == "counterfactual"
                and r.turn is not None
                and (episode.id, r.turn, r.sibling) in keys
                and math.isfinite(r.value)
            ):
                advantages[episode.id, r.turn, r.sibling] = r.value
    return advantages


class Player(Protocol):
    """What replays need of `rollouts.episodes.runner.EpisodeRunner`."""

    async def play(
        self,
        job: EpisodeRequest,
        state: TeamState | None = None,
        *,
        given: Iterable[Turn] = (),
        replace: Mapping[int, Completion] | None = None,
        decisions: Iterable[Decision] = (),
        seed: int | None = None,
    ) -> Episode: ...


async def counterfactual_rewards(
    player: Player,
    episode: Episode,
    config: CreditConfig,
    *,
    baseline: str = "default",
    default: str = "",
    num_replays: int = 1,
) -> Episode:
    """The episode with a reward named `counterfactual` for each turn that replays could judge.

    Args:
        baseline: `default` compares R with the mean R of replays in which the turn says `default`
            instead (difference reward, D = R - R without; one set of replays per taken turn).
            `siblings` compares the answers sampled for one call by the mean R of what follows each,
            A_j = q_j - mean of the others (C3, arXiv:2603.06859; the episode itself is the first
            play of the taken answer).
        num_replays: plays per alternative. The first has the episode's seed, so only the turn
            differs; the others have their own.

    An episode without a finite team reward comes back as it is. A replay that fails or cannot be
    scored is left out and logged; a system that uses `team.rng` before the turn can only be
    replayed with the episode's seed, so with `num_replays=1`.
    """
    if baseline not in ("default", "siblings"):
        raise SettingError(f"baseline: expected default or siblings, got {baseline!r}")
    if math.isnan(_value(episode, config)):
        return episode
    reward_of = _difference if baseline == "default" else _siblings
    calls: dict[int, list[Turn]] = {}
    for turn in episode.turns:
        calls.setdefault(turn.index, []).append(turn)
    rewards = await asyncio.gather(
        *(
            reward_of(player, episode, config, turns, Completion(default), num_replays)
            for turns in calls.values()
            if _has_alternatives(turns, baseline)
        )
    )
    return dataclasses.replace(
        episode,
        rewards=episode.rewards + tuple(reward for of_call in rewards for reward in of_call),
    )


def _has_alternatives(turns: list[Turn], baseline: str) -> bool:
    """Whether replays can compare this call's answers: all sampled, and more than one for
    `siblings`."""
    return len(list(trainable(turns))) == len(turns) and (baseline == "default" or len(turns) > 1)


def _value(episode: Episode, config: CreditConfig) -> float:
    return team_rewards([episode], config)[episode.id]


def _reward(turn: Turn, value: float, text: str) -> Reward:
    return Reward(
        "counterfactual", value, text, turn.agent, turn.index, turn.sibling, source="replay"
    )


async def _difference(
    player: Player,
    episode: Episode,
    config: CreditConfig,
    turns: list[Turn],
    default: Completion,
    num_replays: int,
) -> list[Reward]:
    turn = next(turn for turn in turns if turn.taken)
    without = await _replays(player, episode, config, turn, default, range(num_replays))
    if not without:
        return []
    value = _value(episode, config)
    mean = sum(without) / len(without)
    return [
        _reward(turn, value - mean, f"{value:g} with it, {mean:g} without, {len(without)} replays")
    ]


async def _siblings(
    player: Player,
    episode: Episode,
    config: CreditConfig,
    turns: list[Turn],
    default: Completion,
    num_replays: int,
) -> list[Reward]:
    plays = await asyncio.gather(
        *(
            _replays(
                player, episode, config, turn, turn.completion, range(int(turn.taken), num_replays)
            )
            for turn in turns
        )
    )
    own = [_value(episode, config)]
    scored = [
        (turn, own + values if turn.taken else values)
        for turn, values in zip(turns, plays, strict=True)
    ]
    scored = [(turn, values) for turn, values in scored if values]
    if len(scored) < 2:
        return []
    means, counts = [sum(v) / len(v) for _, v in scored], [len(v) for _, v in scored]
    return [
        _reward(turn, value, f"mean {mean:g} of {count} plays")
        for (turn, _), value, mean, count in zip(
            scored, leave_one_out(means, counts), means, counts, strict=True
        )
    ]


async def _replays(
    player: Player,
    episode: Episode,
    config: CreditConfig,
    turn: Turn,
    completion: Completion,
    numbers: Iterable[int],
) -> list[float]:
    """Team rewards of plays in which `completion` stands in the place of `turn`; those that can be
    scored."""

    async def one(number: int) -> float:
        label = f"{episode.id}/replay/{turn.index}.{turn.sibling}"
        job = EpisodeRequest(episode.task, label, sample=number, step=episode.step, kind="trial")
        played = await player.play(
            job,
            episode.state,
            given=[earlier for earlier in episode.turns if earlier.index < turn.index],
            replace={turn.index: completion},
            decisions=episode.decisions,
            seed=(
                derive_seed(episode.seed, "replay", turn.index, turn.sibling, number)
                if number
                else episode.seed
            ),
        )
        value = _value(played, config)
        if math.isnan(value):
            log.warning(
                "replay of turn %d of %s cannot be scored: %s",
                turn.index,
                episode.id,
                played.error or "NaN reward",
            )
        return value

    values = await asyncio.gather(*map(one, numbers))
    return [value for value in values if not math.isnan(value)]
