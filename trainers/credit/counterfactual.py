"""Counterfactual rewards: what a turn was worth, measured by replays of the episode without it.

Everything before the turn is given, the turn is replaced or sampled anew, the rest of the team
answers anew.
Replays are scored and forgotten: they are never trained on. The credit rule `counterfactual` turns
these rewards into advantages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from ...agents.seeds import derive_seed
from ...agents.state import TeamState
from ...agents.types import Completion, Decision, Reward, Turn
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

    Difference rewards, C3 (arXiv:2603.06859) where one call has several answers (then all of them
    are trained), or differences of values (VinePPO, arXiv:2410.01679).
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
    player: Player, episode: Episode, config: CreditConfig, *, default: str = ""
) -> Episode:
    """The episode with a reward named `counterfactual` for each turn that replays could judge.

    `config.counterfactual_baseline` says what a turn is compared with, `config.num_replays` how
    many plays tell an alternative's reward:

    - `default`: D = R - mean R of replays in which the turn says `default` instead (difference
      reward; one set of replays per selected turn). The first has the episode's seed, so only the
      turn differs; the others have their own.
    - `siblings`: the answers sampled for one call, by the mean R of what follows each, A_j = q_j -
      mean of the others (C3, arXiv:2603.06859; the episode itself is the first play of the selected
      answer).
    - `value`: A_k = V_(k+1) - V_k, where V_k is the mean R of replays that begin before the k-th
      turn, all with seeds of their own, and the last V is R (VinePPO, arXiv:2410.01679). Decisions
      stay as they were.

    An episode without a finite team reward comes back as it is. A replay that fails or cannot be
    scored is left out and logged; a system that uses `team.rng` before the turn can only be
    replayed with the episode's seed, so by `default` or `siblings` and one replay.
    """
    if math.isnan(_value(episode, config)):
        return episode
    calls: dict[int, list[Turn]] = {}
    for turn in episode.turns:
        calls.setdefault(turn.index, []).append(turn)
    baseline, replays = config.counterfactual_baseline, _Replays(player, episode, config)
    judged = [turns for _, turns in sorted(calls.items()) if _has_alternatives(turns, baseline)]
    if baseline == "value":
        rewards = [await _differences_of_values(replays, [_taken(turns) for turns in judged])]
    elif baseline == "siblings":
        rewards = await asyncio.gather(*(_siblings(replays, turns) for turns in judged))
    else:
        said = Completion(default)
        rewards = await asyncio.gather(
            *(_difference(replays, _taken(turns), said) for turns in judged)
        )
    return dataclasses.replace(
        episode,
        rewards=episode.rewards + tuple(reward for of_call in rewards for reward in of_call),
    )


def _taken(turns: Iterable[Turn]) -> Turn:
    return next(turn for turn in turns if turn.taken)


def _has_alternatives(turns: list[Turn], baseline: str) -> bool:
    """Whether replays can compare this call's answers: all sampled, and more than one for
    `siblings`."""
    return len(list(trainable(turns))) == len(turns) and (baseline != "siblings" or len(turns) > 1)


def _value(episode: Episode, config: CreditConfig) -> float:
    return team_rewards([episode], config)[episode.id]


def _reward(turn: Turn, value: float, text: str) -> Reward:
    return Reward(
        "counterfactual", value, text, turn.agent, turn.index, turn.sibling, source="replay"
    )


async def _difference(replays: _Replays, turn: Turn, default: Completion) -> list[Reward]:
    without = await replays.instead(turn, default)
    if not without:
        return []
    value = replays.reward
    mean = fmean(without)
    return [
        _reward(turn, value - mean, f"{value:g} with it, {mean:g} without, {len(without)} replays")
    ]


async def _siblings(replays: _Replays, turns: list[Turn]) -> list[Reward]:
    plays = await asyncio.gather(
        *(replays.instead(turn, turn.completion, int(turn.taken)) for turn in turns)
    )
    scored = [
        (turn, [replays.reward, *values] if turn.taken else values)
        for turn, values in zip(turns, plays, strict=True)
    ]
    scored = [(turn, values) for turn, values in scored if values]
    if len(scored) < 2:
        return []
    means, counts = [fmean(v) for _, v in scored], [len(v) for _, v in scored]
    return [
        _reward(turn, value, f"mean {mean:g} of {count} plays")
        for (turn, _), value, mean, count in zip(
            scored, leave_one_out(means, counts), means, counts, strict=True
        )
    ]


async def _differences_of_values(replays: _Replays, turns: list[Turn]) -> list[Reward]:
    """Rewards of turns, in the order of their calls; none beside a value that is not known."""
    plays = await asyncio.gather(*(replays.before(turn) for turn in turns))
    values = [*(fmean(each) if each else math.nan for each in plays), replays.reward]
    return [
        _reward(turn, after - before, f"{before:g} before it, {after:g} after it")
        for turn, before, after in zip(turns, values, values[1:], strict=False)
        if not math.isnan(after - before)
    ]


@dataclass(frozen=True)
class _Replays:
    """Plays an episode again from one of its turns on, and tells the team's rewards of those plays
    that can be scored."""

    player: Player
    episode: Episode
    config: CreditConfig

    @property
    def reward(self) -> float:
        """The episode's own."""
        return _value(self.episode, self.config)

    async def instead(self, turn: Turn, completion: Completion, first: int = 0) -> list[float]:
        """With `completion` in the place of the turn; plays `first` .. `num_replays` - 1, of which
        play 0 has the episode's seed."""
        numbers = range(first, self.config.num_replays)
        return await self._play("replay", turn, numbers, {turn.index: completion})

    async def before(self, turn: Turn) -> list[float]:
        """With the turn sampled anew."""
        return await self._play("value", turn, range(1, self.config.num_replays + 1), None)

    async def _play(
        self,
        name: str,
        turn: Turn,
        numbers: Iterable[int],
        replace: Mapping[int, Completion] | None,
    ) -> list[float]:
        async def one(number: int) -> float:
            episode = self.episode
            label = f"{episode.id}/{name}/{turn.index}.{turn.sibling}"
            job = EpisodeRequest(
                episode.task, label, sample=number, step=episode.step, kind="trial"
            )
            played = await self.player.play(
                job,
                episode.state,
                given=[earlier for earlier in episode.turns if earlier.index < turn.index],
                replace=replace,
                decisions=episode.decisions,
                seed=(
                    derive_seed(episode.seed, name, turn.index, turn.sibling, number)
                    if number
                    else episode.seed
                ),
            )
            value = _value(played, self.config)
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
