"""Rewards of games: payoffs of the two players."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ...agents.lookup import trusted
from ...agents.types import Reward, Task
from ..types import Episode


@trusted("reward")
def payoff(task: Task, episode: Episode) -> list[Reward]:
    """Each player's payoff, as the referee recorded it."""
    return _each(episode, "payoff", lambda own, other: own)


@trusted("reward")
def won(task: Task, episode: Episode) -> list[Reward]:
    """1 for the player with the higher payoff, 0 for the other, 1/2 for both if they are equal."""
    return _each(episode, "won", lambda own, other: 0.5 if own == other else float(own > other))


@trusted("reward")
def first_payoff(task: Task, episode: Episode) -> float:
    """Payoff of the player who moves first (the seller)."""
    return _payoffs(episode)[0][1]


@trusted("reward")
def second_payoff(task: Task, episode: Episode) -> float:
    """Payoff of the player who moves second (the buyer)."""
    return _payoffs(episode)[1][1]


@trusted("reward")
def deal(task: Task, episode: Episode) -> float:
    """1 if the players agreed, else 0."""
    return float(_record(episode)["ended"] == "deal")


def _payoffs(episode: Episode) -> list[tuple[str, float]]:
    """Player and payoff, in the order in which they move."""
    record = _record(episode)
    return [(player, float(record["payoffs"][player])) for player in record["players"]]


def _each(episode: Episode, name: str, value: Callable[[float, float], float]) -> list[Reward]:
    """A reward for each player that was asked, from its own and the other's payoff."""
    spoke = {turn.agent for turn in episode.turns}
    (first, one), (second, two) = _payoffs(episode)
    given = ((first, value(one, two)), (second, value(two, one)))
    return [
        Reward(name, reward, agent=player, source="referee")
        for player, reward in given
        if player in spoke
    ]


def _record(episode: Episode) -> dict[str, Any]:
    """The referee's record: the output of every `Game`."""
    record = json.loads(episode.output or "{}")
    if not isinstance(record, dict) or "payoffs" not in record:
        raise ValueError(
            "the output is no game's record; this reward is for systems of marlora.agents.games"
        )
    return record
