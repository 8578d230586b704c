"""Runs side by side: a paired test on the tasks that both were evaluated on, and shared curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.report.charts import Line
from marlora.rollouts.report.comparison import (
    comparison,
    difference_table,
    mean_line,
    paired_tests,
    shared_curves,
)
from marlora.rollouts.report.episode_index import EpisodeRow
from marlora.rollouts.report.run_data import RunData


def row(task: str, value: float, prompt: str = "") -> EpisodeRow:
    """An episode of the evaluation after training."""
    return EpisodeRow(
        id=f"eval-{task}/0", group=f"eval-{task}", kind="eval", task=task,
        prompt=prompt or f"task {task}", step=3, state="", worth=value, rewards={}, agents=(),
        usage=(), marks="", about="", child=False, evaluations=("after",),
    )  # fmt: skip


def run_of(name: str, values: dict[str, float], **metrics: Any) -> RunData:
    rows = [{"step": s, "policies": {p: {"entropy": v * s} for p, v in metrics.items()}}
            for s in (1, 2)]  # fmt: skip
    return RunData(
        Path(name), name, {"rewards": ["mine:exact"]}, {}, rows,
        [row(task, value) for task, value in values.items()], {"after": {"step": 3}},
    )  # fmt: skip


ONE = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0, "only": 1.0}
OTHER = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "new": 0.0}


def test_the_paired_test_by_hand() -> None:
    """Three of four shared tasks were gained, none lost: 2 / 2 ** 3."""
    (found,) = paired_tests([run_of("one", ONE), run_of("other", OTHER)])
    assert (found["run"], found["against"], found["tasks"]) == ("other", "one", 4)
    assert (found["difference"], found["gained"], found["lost"]) == (0.75, 3, 0)
    assert found["p"] == 0.25 and found["ci95"] == pytest.approx([0.26, 1.24], abs=1e-3)


@pytest.mark.parametrize("change", ["prompts", "rewards", "tasks", "not evaluated"])
def test_what_cannot_be_compared_is_not(change: str) -> None:
    one, other = run_of("one", ONE), run_of("other", OTHER)
    if change == "prompts":
        other.episodes = [row(task, 1.0, "another") for task in OTHER]
    elif change == "rewards":
        other.metric = "contains"
    elif change == "tasks":
        other.episodes = [row("new", 1.0)]
    else:
        other.episodes = [dataclasses.replace(r, evaluations=()) for r in other.episodes]
    assert paired_tests([one, other]) == []
    assert "no test is possible" in difference_table([one, other], {"one": "c0", "other": "c1"})


def test_shared_curves_are_of_metrics_that_two_runs_have() -> None:
    runs = [run_of("one", ONE, a=1.0, b=3.0), run_of("other", OTHER, x=5.0)]
    runs[0].metrics = [{**r, "alone": r["step"]} for r in runs[0].metrics]
    (curve,) = shared_curves(runs, {"one": "c0", "other": "c1"})
    assert curve.metric.name == "policies/*/entropy"
    assert {name: line.points for name, line in curve.lines.items()} == {
        "one": [(1, 2.0), (2, 4.0)],
        "other": [(1, 5.0), (2, 10.0)],
    }
    page = comparison(runs)
    assert "<title>step 2, other 10</title>" in page and "+0.750" in page


def test_a_mean_is_over_the_policies_that_have_a_value() -> None:
    lines = {"a": Line([(1, 0.0), (2, 4.0)]), "b": Line([(1, 1.0)]), "c": Line([])}
    assert mean_line(lines).points == [(1, 0.5), (2, 4.0)]
