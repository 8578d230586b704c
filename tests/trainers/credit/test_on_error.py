"""Under `on_error: zero` an episode whose program raised counts among the others of its group."""

from __future__ import annotations

import dataclasses

import pytest

from marlora.agents.types import Reward, Task, Turn
from marlora.rollouts.evaluation.accuracy import evaluation
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig, team_rewards
from marlora.trainers.monitoring.step_metrics import collection_row, unscorable

TASK = Task("t", "1+1", "2")
RIGHT = Episode(
    "right",
    "g",
    TASK,
    turns=(Turn(0, "a", token_ids=(1,), logprobs=(-1.0,)),),
    output="2",
    rewards=(Reward("exact", 1.0),),
)
RAISED = dataclasses.replace(
    RIGHT, id="raised", output="", stop_reason="error", rewards=(Reward("exact", 0.0, "raised"),)
)
DROPPED = dataclasses.replace(RAISED, id="dropped", output=None, error="raised", rewards=())


def test_its_turns_learn_from_0_and_a_dropped_ones_do_not() -> None:
    assert team_rewards([RIGHT, RAISED], CreditConfig()) == {"right": 1.0, "raised": 0.0}
    advantages = credit([RIGHT, RAISED, DROPPED], CreditConfig(credit="grpo", scale_rewards="none"))
    # the mean of 1 and 0 is .5
    assert advantages == {("right", 0, 0): 0.5, ("raised", 0, 0): -0.5}


def test_it_counts_as_failed_all_the_same() -> None:
    measured = evaluation([TASK], [RIGHT, RAISED], "exact")
    assert (measured.accuracy, measured.failed, measured.errors) == (0.5, 1, ("raised",))
    row = collection_row(1, [RIGHT, RAISED], "exact", pytest.fail, 1.0)
    assert (row["reward"], row["failed"], row["unscorable"]) == (0.5, 1, 0)
    assert not unscorable(RAISED) and unscorable(DROPPED)


def test_the_runs_setting_reaches_its_episodes() -> None:
    assert RunConfig().limits().on_error == "drop"
    assert RunConfig(on_error="zero").limits().on_error == "zero"
