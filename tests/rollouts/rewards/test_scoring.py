"""What reward functions may name: agents and turns of the episode, and no name twice."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import pytest

from marlora.agents.types import Decision, Reward, SettingError, Task, Turn, Usage
from marlora.rollouts.rewards.builtin import correct, resolve_rewards
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.types import Episode

TASK = Task("t", "?", "4")
EPISODE = Episode(
    "e",
    "g",
    TASK,
    turns=(Turn(0, "solver"), Turn(1, "critic"), Turn(1, "critic", sibling=1, taken=False)),
    usage={"solver": Usage(), "critic": Usage(), "silent": Usage()},
    decisions=(Decision(0, "edge", ("yes", "no"), "yes", math.log(0.5)),),
    output="4",
)


def scored(*rewards: Any) -> tuple[Reward, ...]:
    return asyncio.run(score(TASK, EPISODE, rewards))


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"agent": "solver"},
        {"agent": "silent"},  # it never spoke, and is of the team
        {"turn": 1},
        {"turn": 1, "sibling": 1},
        {"turn": 1, "agent": "critic"},
        {"decision": 0},
        {"decision": 0, "agent": "critic"},
    ],
)
def test_a_reward_may_name_what_the_episode_has(named: dict[str, Any]) -> None:
    def mine(task: Task, episode: Episode) -> list[Reward]:
        return [Reward("good", 0.5, **named)]

    assert scored(mine) == (Reward("good", 0.5, **named),)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"agent": "sovler"}, "no such agent; did you mean 'solver'"),
        ({"agent": "judge"}, "no such agent; known: 'solver', 'critic', 'silent'"),
        ({"agent": ""}, "agent ''"),
        ({"turn": 2}, "turn 2"),
        ({"turn": -1}, "turn -1"),
        ({"turn": 0, "sibling": 1}, "turn 0, sibling 1"),
        ({"decision": 1}, "decision 1: the episode has 1 decisions"),
        ({"turn": 0, "agent": "critic"}, "'critic': that turn is of agent 'solver'"),
    ],
)
def test_a_reward_that_names_nobody_leaves_the_episode_unscorable(
    named: dict[str, Any], why: str
) -> None:
    def mine(task: Task, episode: Episode) -> list[Reward]:
        return [Reward("good", 1.0, agent="solver"), Reward("good", 0.5, **named)]

    rewards = scored(correct, mine)
    assert rewards[0] == Reward("correct", 1.0)
    assert [math.isnan(reward.value) for reward in rewards[1:]] == [True, True]
    assert rewards[1].agent == "solver" and rewards[2].agent is rewards[2].turn is None
    assert all("reward 'mine' names" in r.text and why in r.text for r in rewards[1:])


def test_two_functions_that_give_one_reward_are_not_added_up() -> None:
    def one(task: Task, episode: Episode) -> Reward:
        return Reward("good", 1.0)

    def other(task: Task, episode: Episode) -> list[Reward]:
        return [Reward("good", 1.0, agent="solver"), Reward("good", 1.0)]

    first, own, both = scored(one, other)
    assert first == Reward("good", 1.0) and own.agent == "solver" and own.value == 1.0
    assert math.isnan(both.value) and "'one' and 'other' both give 'good'" in both.text


def test_a_reward_of_a_decision_is_not_the_whole_team_s() -> None:
    whole, part = Reward("good", 0.5), Reward("good", 7.0, decision=0)
    episode = dataclasses.replace(EPISODE, rewards=(whole, part))
    assert episode.reward("good") == 0.5

    def mine(task: Task, episode: Episode) -> list[Reward]:
        return [part]

    def other(task: Task, episode: Episode) -> list[Reward]:
        return [whole]

    assert scored(mine, other) == (part, whole)


def test_two_functions_of_one_name_are_refused() -> None:
    def clone(task: Task, episode: Episode) -> float:
        return 1.0

    clone.__name__ = "correct"
    for names in (["correct", clone], ["correct", "correct"], [clone, "exact", clone]):
        with pytest.raises(SettingError, match="rewards: two functions are called 'correct'"):
            resolve_rewards(names)
