"""Ratings that the agents of a temporal network give one another
(`marlora.agents.patterns.temporal_network`), as rewards; in a YAML file `rewards: [correct,
marlora.rollouts.rewards.ratings:ratings]`."""

from __future__ import annotations

from ...agents.lookup import trusted
from ...agents.patterns.temporal_network import RATING
from ...agents.types import Reward, Task
from ..types import Episode


@trusted("reward")
def ratings(task: Task, episode: Episode) -> list[Reward]:
    """A reward named `rating`, from 0 to 1, for each time that a turn was rated; its source is the
    index of the turn that rated. They count towards training only if `reward_weights` names
    them."""
    return [reward for reward in episode.rewards if reward.name == RATING]
