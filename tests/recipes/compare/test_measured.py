"""Votes, samples and costs of episodes, by hand."""

from __future__ import annotations

import pytest

from marlora.agents.types import Reward, Task, Usage
from marlora.recipes.compare.measured import (
    Measurement,
    by_sample,
    by_vote,
    mean_of,
    of_episodes,
    task_key,
)
from marlora.recipes.compare.reference import headroom_sentence, samples_within, shown_by
from marlora.recipes.compare.statistics import detectable
from marlora.rollouts.types import Episode

GOLD = {"t1": "4", "t2": "7"}


def episode(task: str, sample: int, output: str | None, parent: str | None = None) -> Episode:
    """Costs one call, ten tokens of prompt and three of reply."""
    right = float(output == GOLD[task])
    return Episode(
        id=f"eval-x/{task}/{sample}" + ("/Chain/x/0" if parent else ""),
        group=f"eval-x/{task}",
        task=Task(task, f"asks {task}"),
        parent=parent,
        output=output,
        error=None if output is not None else "failed",
        rewards=(Reward("exact", right),) if output is not None else (),
        usage={"first": Usage(1, 10, 3)},
        kind="eval",
    )


EPISODES = [
    episode("t1", 0, "4"),
    episode("t1", 1, "4"),
    episode("t1", 2, "5"),
    episode("t2", 0, "8"),
    episode("t2", 1, "8"),
    episode("t2", 2, "7"),
    episode("t2", 2, "7", parent="eval-x/t2/2"),
]
T1, T2 = task_key("t1", "asks t1"), task_key("t2", "asks t2")


def test_the_mean_of_samples_and_what_a_task_costs() -> None:
    """Seven calls of 13 tokens on two tasks; the child costs, and is no sample."""
    result = of_episodes(EPISODES, "exact", seed=3)
    assert result.scores == {3: {T1: pytest.approx(2 / 3), T2: pytest.approx(1 / 3)}}
    assert (result.calls, result.prompt_tokens, result.sampled_tokens) == (3.5, 35, 10.5)
    assert result.tokens == 45.5


def test_self_consistency_scores_the_answer_of_the_majority() -> None:
    result = by_vote(EPISODES, "exact", 3)
    assert result.scores == {0: {T1: 1.0, T2: 0.0}} and result.tokens == 45.5


def test_an_episode_that_failed_has_no_vote_and_counts_nothing() -> None:
    episodes = [episode("t1", 0, "4"), episode("t1", 1, None), episode("t1", 2, None)]
    assert by_vote(episodes, "exact", 3).scores == {0: {T1: 1.0}}
    assert of_episodes(episodes, "exact").scores == {0: {T1: pytest.approx(1 / 3)}}


def test_plays_are_told_apart_by_their_sample() -> None:
    assert by_sample(EPISODES, "exact", 3) == [
        {T1: 1.0, T2: 0.0},
        {T1: 1.0, T2: 0.0},
        {T1: 0.0, T2: 1.0},
    ]


def test_seeds_of_an_arm_are_one_measurement() -> None:
    parts = [Measurement({s: {"a": float(s)}}, 1.0 + s, 10.0, 4.0) for s in (0, 1)]
    assert mean_of(parts) == Measurement({0: {"a": 0.0}, 1: {"a": 1.0}}, 1.5, 10.0, 4.0)


def test_samples_are_those_that_the_tokens_pay_for() -> None:
    assert [samples_within(t, 13.0) for t in (5, 13, 38.9, 39, 130)] == [1, 1, 2, 3, 10]
    assert samples_within(0.3, 0.1) == 3  # 0.3 / 0.1 is a little below 3


HEADROOM = {
    "team": 0.5,
    "sampled": 0.45,
    "best_of": {"samples": 4, "score": 0.6},
    "held_out_tasks": 40,
    "comparisons": 3,
    "detectable": 0.2,
}


def test_headroom_in_a_sentence() -> None:
    """The best of several samples is a bound: it is chosen by the reward itself."""
    assert headroom_sentence(HEADROOM) == (
        "The best of 4 samples, chosen by the reward itself, has 0.600 where the team as it is has"
        " 0.500 and one sample 0.450: what such a choice adds is in part luck of sampling, so it is"
        " a bound and no promise. With 40 held-out tasks and 3 comparisons differences from 0.200"
        " on can be shown; hold out more tasks, or compare fewer arms."
    )
    none = {**HEADROOM, "best_of": {"samples": 4, "score": 0.5}}
    assert headroom_sentence(none).startswith("Nothing shows that there is something to gain")
    enough = headroom_sentence({**none, "other_model": 0.9})
    assert "no promise; another model in every seat has 0.900. With" in enough
    assert enough.endswith("on can be shown.")


def test_what_can_be_shown_depends_on_the_number_of_comparisons() -> None:
    few, many = (shown_by({**HEADROOM, "spread": 0.5}, count) for count in (1, 10))
    assert few["detectable"] == detectable(0.5, 40, 1) < many["detectable"]
    assert "10 comparisons" in many["summary"]
