"""Credit rules without a group: the team's, the agent's or the turn's own return, no baseline."""

from __future__ import annotations

import math
from collections import defaultdict

from ...agents.types import Turn
from ...rollouts.types import Episode
from .weights import (
    Advantages,
    CreditConfig,
    RewardedEpisodes,
    about_whole,
    key_of,
    selected_turns,
    trainable,
    trainable_keys,
    weighted_sum,
)


def team(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A_t = discount^(T - 1 - t) R with the team's reward R and t = 0 .. T - 1 counting selected
    turns."""
    advantages = Advantages()
    for episode in batch.episodes:
        turns, reward = selected_turns(episode), batch.rewards[episode.id]
        position = {key_of(episode, turn): t for t, turn in enumerate(turns)}
        if not math.isnan(reward):
            advantages |= {
                key: settings.discount ** (len(turns) - 1 - position[key]) * reward
                for key in trainable_keys(episode, turns)
            }
    return advantages


def agent(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = the agent's own reward for all its turns; the team's where it has none."""
    own = {
        key_of(episode, turn): batch.reward_of(episode, turn.agent, settings)
        for episode in batch.episodes
        for turn in trainable(selected_turns(episode))
    }
    return {key: reward for key, reward in own.items() if not math.isnan(reward)}


def turn(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """Ret_t = r_t + [t is last] R + discount Ret_{t+1} from rewards r of turns and the team's R.

    Clock `global`: t counts all turns, so a turn earns what later turns of others earn. Clock
    `own`: the same over the agent's own turns only, R added to each agent's last.
    """
    advantages = Advantages()
    for episode in batch.episodes:
        of_turns = [r for r in episode.rewards if r.turn is not None and settings.weight(r.name)]
        has_team = any(
            r.agent is None and about_whole(r) and settings.weight(r.name) for r in episode.rewards
        )
        last = batch.rewards[episode.id] if has_team else 0.0
        if (
            episode.error is not None
            or math.isnan(last)
            or not all(math.isfinite(r.value) for r in of_turns)
            or not (of_turns or has_team)
        ):
            continue
        for turns in _clocks(episode, settings.turn_clock):
            later = last
            for each in reversed(turns):
                own = weighted_sum(
                    (r for r in of_turns if (r.turn, r.sibling) == (each.index, each.sibling)),
                    settings,
                )
                # of the last turn `later` is R itself, which is not discounted
                later = own + (later if each is turns[-1] else settings.discount * later)
                advantages |= {key: later for key in trainable_keys(episode, [each])}
    return advantages


def _clocks(episode: Episode, turn_clock: str) -> list[list[Turn]]:
    """The selected turns, as one sequence (`global`) or as one per agent (`own`)."""
    sequences: dict[str, list[Turn]] = defaultdict(list)
    for each in selected_turns(episode):
        sequences["" if turn_clock == "global" else each.agent].append(each)
    return list(sequences.values())
