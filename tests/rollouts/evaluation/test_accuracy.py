"""Intervals and paired differences by numbers worked out by hand; what counts as a score."""

from __future__ import annotations

import asyncio
import math

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import Reward, SettingError, Task, Usage
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRunner
from marlora.rollouts.evaluation.accuracy import best, evaluate, evaluation
from marlora.rollouts.evaluation.statistics import Evaluation, interval, paired, wilson
from marlora.rollouts.types import Episode

TASKS = [Task(name, name, name) for name in "wxyz"]


def test_wilson_by_hand() -> None:
    # 5 of 10, z = 2: middle (.5 + 4/20) / 1.4 = .5; half 2/1.4 * sqrt(.025 + .01) = .267261
    assert wilson(0.5, 10, z=2) == pytest.approx((0.232739, 0.767261), abs=1e-6)
    # none of 4, z = 2: middle (4/8) / 2 = .25; half 2/2 * sqrt(4/64) = .25
    assert wilson(0.0, 4, z=2) == pytest.approx((0.0, 0.5))
    assert wilson(1.0, 4, z=2) == pytest.approx((0.5, 1.0))
    assert wilson(0.44, 200) == pytest.approx((0.3729, 0.5093), abs=1e-4)  # z = 1.96


def test_scores_that_are_no_shares_get_the_normal_interval() -> None:
    # mean -2, spread sqrt((1 + 1) / 1) = sqrt 2, half = z * sqrt(2) / sqrt(2) = 2
    assert interval([-1.0, -3.0], z=2) == pytest.approx((-4.0, 0.0))
    assert interval([1.0, 0.0], z=2) == wilson(0.5, 2, z=2)
    assert interval([0.25], z=2) == (0.25, 0.25)
    assert Evaluation({"x": -3.0, "y": -1.0}).summary()["accuracy"] == -2.0


def test_paired_by_hand() -> None:
    before = Evaluation({"w": 0.0, "x": 0.0, "y": 1.0, "z": 1.0})
    after = Evaluation({"z": 0.0, "w": 1.0, "x": 1.0, "y": 1.0})
    # differences 1, 1, 0, -1: mean .25, spread sqrt((.5625 * 2 + .0625 + 1.5625) / 3) = .957427,
    # half = 2 * .957427 / 2
    found = paired(before, after, z=2)
    assert found["difference"] == 0.25 and (found["gained"], found["lost"]) == (2, 1)
    assert found["ci95"] == pytest.approx([0.25 - 0.957427, 0.25 + 0.957427], abs=1e-6)
    assert paired(before, before)["ci95"] == [0.0, 0.0]
    with pytest.raises(SettingError, match="different tasks"):
        paired(before, Evaluation({"w": 1.0}))


def episode(task: Task, *rewards: Reward, **facts: object) -> Episode:
    return Episode(task.id, task.id, task, rewards=rewards, usage={"a": Usage(1, 5, 3)}, **facts)  # type: ignore[arg-type]


def test_what_failed_or_cannot_be_scored_counts_0_and_is_counted() -> None:
    found = evaluation(
        TASKS,
        [
            episode(TASKS[3], Reward("exact", 1.0), Reward("format", 1.0)),
            episode(TASKS[0], error="IndexError", stop_reason="error"),
            episode(TASKS[1], Reward("exact", math.nan, "reward 'exact' gave nan")),
            episode(TASKS[2], Reward("exact", 1.0), Reward("exact", 0.0, agent="a")),
            episode(Task("child", ""), Reward("exact", 0.0), parent="z"),
        ],
        "exact",
    )
    assert found.scores == {"w": 0.0, "x": 0.0, "y": 1.0, "z": 1.0} and list(found.scores) == list(
        "wxyz"
    )
    assert found.failed == 2 and found.errors == ("IndexError", "reward 'exact' gave nan")
    assert found.tokens == 15  # children cost tokens too
    assert found.summary()["accuracy"] == 0.5


def test_a_task_that_was_played_more_than_once_counts_by_the_mean() -> None:
    """w: 1, 0, unscorable (0), 1; x: once."""
    values = [1.0, 0.0, math.nan, 1.0]
    played = [
        Episode(f"w{n}", "w", TASKS[0], rewards=(Reward("exact", value),))
        for n, value in enumerate(values)
    ]
    found = evaluation(TASKS[:2], [*played, episode(TASKS[1], Reward("exact", 1.0))], "exact")
    assert found.scores == {"w": 0.5, "x": 1.0} and found.failed == 1 and found.accuracy == 0.75


def test_a_metric_that_no_reward_bears_is_told_rather_than_counted_0() -> None:
    with pytest.raises(
        SettingError,
        match=(
            "rewards: the first one, 'is_right', gives no reward of the team by its own name;"
            " known: 'ok'"
        ),
    ):
        evaluation(
            TASKS[:1],
            [episode(TASKS[0], Reward("ok", 1.0), Reward("is_right", 1.0, agent="a"))],
            "is_right",
        )
    with pytest.raises(SettingError, match="the task set is empty"):
        evaluation([], [], "exact")


def test_evaluate_plays_every_task_once_and_greedily() -> None:
    engine = ScriptedEngine(
        lambda prompt, ref, sampling, k: "x" if sampling.temperature == 0 else "warm"
    )
    rollouts = EpisodeRunner(
        Chain(["a"]),
        {"a": EngineCompleter(engine, engine.tokens, "a")},
        [lambda t, e: e.output == t.answer],
    )
    found = asyncio.run(evaluate(rollouts, TASKS))
    assert found.scores == {"w": 0.0, "x": 1.0, "y": 0.0, "z": 0.0} and len(engine.calls) == 4
    assert asyncio.run(evaluate(rollouts, TASKS, greedy=False)).accuracy == 0.0


def test_best_of_n_takes_the_highest_scored_episode_of_every_task() -> None:
    def played(
        name: str, value: float, task: Task = TASKS[0], parent: str | None = None
    ) -> Episode:
        return Episode(name, "g", task, parent=parent, rewards=(Reward("r", value),))

    several = [
        played("a", math.nan),
        played("b", 0.5),
        played("c", 0.7),
        played("d", 0.7),
        played("e", 0.9, parent="d"),
    ]
    alone = [played("f", math.nan, TASKS[1])]
    assert [episode.id for episode in best(several + alone, "r")] == ["c", "f"]
