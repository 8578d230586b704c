"""Role-conditioned advantage estimation (RAE) for self-play: a running baseline per task source and
agent (SPIRAL, arXiv:2506.24119)."""

from __future__ import annotations

import math

from .weights import Advantages, CreditConfig, RewardedEpisodes, selected_turns, trainable_keys


def rae(batch: RewardedEpisodes, settings: CreditConfig) -> Advantages:
    """A = R_agent - b, then b <- rae_decay b + (1 - rae_decay) R_agent.

    b is kept per task source and agent in `batch.state`, starts at 0, and is updated after use,
    episode by episode in order of their ids, so one episode per task is enough and the order of
    arrival does not matter. Of an agent's turns the k-th from the end gets A discount^k.
    """
    advantages = Advantages()
    for episode in sorted(batch.episodes, key=lambda e: e.id):
        turns = selected_turns(episode)
        for name in dict.fromkeys(turn.agent for turn in turns):
            reward = batch.reward_of(episode, name, settings)
            if math.isnan(reward):
                continue
            entry = f"rae/{episode.task.source}/{name}"
            baseline = batch.state.get(entry, 0.0)
            batch.state[entry] = settings.rae_decay * baseline + (1 - settings.rae_decay) * reward
            own = [turn for turn in turns if turn.agent == name]
            for k, turn in enumerate(reversed(own)):
                advantages |= {
                    key: (reward - baseline) * settings.discount**k
                    for key in trainable_keys(episode, [turn])
                }
    return advantages
