"""Importance of agents from their ratings. Unit facts of DyLAN (arXiv:2310.02170), worked out by
hand."""

from __future__ import annotations

import math

import pytest

from marlora.agents.types import Reward, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.methods.selection.importance import importance, propagate, shares

NAMES = ("a", "b", "c")


def network(
    ratings: list[list[list[float]]], answers: list[str], output: str | None = "20"
) -> Episode:
    """An episode of three agents. `ratings[t][j]`: points of agent j at step t + 2 for the answers
    of step t + 1. `answers`: of the last step."""
    count, steps = len(NAMES), len(ratings) + 1
    turns, rewards = [], []
    for index in range(count * steps):
        step, agent = divmod(index, count)
        text = answers[agent] if step == steps - 1 else f"{index}"
        turns.append(Turn(index, NAMES[agent], text=text))
        for rated, points in enumerate(ratings[step - 1][agent] if step else []):
            node = (step - 1) * count + rated
            rewards.append(Reward("rating", points, "", NAMES[rated], node, source=str(index)))
    rewards.append(Reward("exact", 1.0))
    return Episode(
        "e", "g", Task("t", "7+8+5"), turns=tuple(turns), rewards=tuple(rewards), output=output
    )


RATINGS = [
    [[0.6, 0.6, 0.8], [1.0, 1.0, 0.0], [0.2, 0.4, 0.4]],
    [[1.0, 0.6, 0.4], [0.2, 0.2, 0.2], [0.8, 0.8, 0.0]],
]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([1.0, 0.6, 0.4], [0.5, 0.3, 0.2]),
        ([0.8, 0.8, 0.0], [0.5, 0.5, 0.0]),
        ([1.0, 0.2, 0.0], [0.833333, 0.166667, 0.0]),  # [9, 1, -2]
        ([0.0, 0.0, 0.0], [1 / 3] * 3),
        ([math.nan] * 3, [1 / 3] * 3),
    ],
)
def test_points_become_shares(points: list[float], expected: list[float]) -> None:
    assert shares(points) == pytest.approx(expected, abs=1e-6)


def test_importance_flows_back_over_the_ratings() -> None:
    """Agents 1 and 3 gave the output: I_3 = [.5, 0, .5], I_2 = [.5, .4, .1], I_1 = [.37, .39,
    .24]."""
    found = importance(network(RATINGS, ["20", "19", "20"]))
    steps = [[found.nodes[3 * step + agent] for agent in range(3)] for step in (2, 1, 0)]
    assert steps[0] == [0.5, 0.0, 0.5]
    assert steps[1] == pytest.approx([0.5, 0.4, 0.1])
    assert steps[2] == pytest.approx([0.37, 0.39, 0.24])
    assert found.agents == pytest.approx({"a": 1.37, "b": 0.79, "c": 0.84})
    assert sum(found.agents.values()) == pytest.approx(3.0)
    assert (found.unmatched, found.unread) == (False, 0.0)


def test_where_nobody_gave_the_output_all_importance_is_0_and_said() -> None:
    for output in ("21", "", None):
        found = importance(network(RATINGS, ["20", "19", "20"], output))
        assert found.agents == {"a": 0.0, "b": 0.0, "c": 0.0} and found.unmatched


def test_points_that_tell_nothing_are_counted() -> None:
    silent = [[[math.nan] * 3, [0.0] * 3, [0.2, 0.4, 0.4]]]
    found = importance(network(silent, ["20", "20", "20"]))
    assert found.unread == pytest.approx(2 / 3)
    assert found.agents["a"] == pytest.approx(1 / 3 + (1 / 3 + 1 / 3 + 0.2) / 3)


def test_a_network_of_one_step() -> None:
    found = importance(network([], ["20", "19", "20"]))
    assert found.agents == {"a": 0.5, "b": 0.0, "c": 0.5}


def test_a_chain_of_ratings() -> None:
    assert propagate({2: 1.0}, {2: {1: 1.0}, 1: {0: 1.0}}) == {0: 1.0, 1: 1.0, 2: 1.0}
