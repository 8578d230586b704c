"""Ratings that a temporal network gives itself stand in its episodes where `rewards` names them."""

from __future__ import annotations

import asyncio
import math

from marlora.agents.lookup import only_trusted
from marlora.agents.patterns.temporal_network import TemporalNetwork
from marlora.agents.testing import fake_team
from marlora.agents.types import Reward, Task
from marlora.rollouts.rewards.builtin import resolve_rewards
from marlora.rollouts.rewards.names import names_given
from marlora.rollouts.types import Episode
from marlora.trainers.credit.weights import CreditConfig

NAME = "marlora.rollouts.rewards.ratings:ratings"


def test_ratings_and_nothing_else_are_passed_on() -> None:
    task = Task("t", "7+8+5", "20")
    system = TemporalNetwork(["a", "b"], steps=2)
    team = fake_team(system.specs, lambda agent, _: f"{agent} [[5, 1]]" if agent == "a" else "b")
    asyncio.run(system.run(task, team))
    with only_trusted():
        (ratings,) = resolve_rewards([NAME])
    given = (*team.rewards, Reward("exact", 1.0))
    found = ratings(task, Episode("e", "g", task, turns=team.turns, rewards=given))
    assert isinstance(found, list) and len(found) == 4
    assert {(r.name, r.turn) for r in found} == {("rating", 0), ("rating", 1)}
    by_rater = {index: [r.value for r in found if r.source == str(index)] for index in (2, 3)}
    rater = {turn.agent: turn.index for turn in team.turns[2:]}
    assert by_rater[rater["a"]] == [1.0, 0.2]
    assert all(map(math.isnan, by_rater[rater["b"]]))
    assert names_given([ratings]) == {"rating"}


def test_they_are_not_learnt_from_unless_a_weight_says_so() -> None:
    assert CreditConfig().weight("rating") == 0.0
    assert CreditConfig(reward_weights={"rating": 0.5}).weight("rating") == 0.5
