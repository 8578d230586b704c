"""Importance of agents: ratings of answers, propagated backward through the steps of a temporal
network (DyLAN, arXiv:2310.02170, section 3.3).

The m nodes of the last step whose answer is the network's own output share an importance of 1; a
node of an earlier step gets from every node that rated it that node's importance times its share of
the points that it gave. So each step sums to 1, and an agent's importance is the sum over its
nodes. Nothing here knows the right answer: what is measured is agreement with the output.

Against the authors' code: where nobody's answer is the output all importance is 0 and
`unmatched` says so (there a division by zero); a rater whose points cannot be read or are all 0
counts with equal weights, as there, and is counted in `unread`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....agents.patterns.temporal_network import RATING, answered
from ....agents.text.answers import same, vote
from ....agents.types import Turn
from ....rollouts.types import Episode

Weights = Mapping[int, Mapping[int, float]]  # by rating node, by rated node; each sums to 1


@dataclass(frozen=True)
class Importance:
    """What one episode says of its agents.

    Args:
        agents: importance by agent; they sum to the number of steps, or are all 0.
        nodes: importance by turn index.
        unmatched: no answer of the last step was the output.
        unread: share of the rating nodes whose points told nothing.
    """

    agents: Mapping[str, float]
    nodes: Mapping[int, float]
    unmatched: bool = False
    unread: float = 0.0


def shares(points: Sequence[float]) -> list[float]:
    """Points divided by their sum; equal shares where one is unknown (NaN) or all are 0."""
    total = sum(points)
    if math.isnan(total) or total <= 0:
        return [1 / len(points)] * len(points)
    return [value / total for value in points]


def propagate(last: Mapping[int, float], weights: Weights) -> dict[int, float]:
    """Importance of every node, from that of the last step's: I(i) = sum over raters j of I(j)
    w(j, i). Nodes are numbered so that raters come after what they rate."""
    found = {node: 0.0 for rated in weights.values() for node in rated} | dict(last)
    for rater in sorted(weights, reverse=True):
        for node, weight in weights[rater].items():
            found[node] += found[rater] * weight
    return found


def importance(episode: Episode) -> Importance:
    """Importance of the agents of one episode of a `TemporalNetwork`. An agent that was not asked
    at a step has no node there."""
    points = _points(episode)
    weights = {
        rater: dict(zip(given, shares([*given.values()]), strict=True))
        for rater, given in points.items()
    }
    last = _last(episode, points)
    right = [n for n in last if same(vote(answered(last[n])), vote(episode.output))]
    start = {node: 1 / len(right) if node in right else 0.0 for node in last}
    nodes = propagate(start, weights)
    agents: dict[str, float] = {}
    for turn in episode.turns:
        if turn.index in nodes:
            agents[turn.agent] = agents.get(turn.agent, 0.0) + nodes[turn.index]
    told = [sum(given.values()) > 0 for given in points.values()]  # False for NaN too
    unread = told.count(False) / len(told) if told else 0.0
    return Importance(agents, nodes, not right, unread)


def _points(episode: Episode) -> dict[int, dict[int, float]]:
    """By rating node, by rated node: the points given."""
    found: dict[int, dict[int, float]] = {}
    for reward in episode.rewards:
        if reward.name == RATING and reward.turn is not None:
            found.setdefault(int(reward.source), {})[reward.turn] = reward.value
    return found


def _last(episode: Episode, points: Mapping[int, Mapping[int, float]]) -> dict[int, Turn]:
    """The nodes of the last step by turn index: those that rate and are not rated; all turns of a
    network that ended at its first step."""
    rated = {node for given in points.values() for node in given}
    final = {node for node in points if node not in rated}
    return {turn.index: turn for turn in episode.turns if not points or turn.index in final}
