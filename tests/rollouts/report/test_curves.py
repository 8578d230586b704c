"""Which curves are drawn, under which titles, and which are folded away."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from marlora.rollouts.report.curves import MetricCurve, group_curves, metric_curves
from marlora.rollouts.report.run_data import RunData

EVIL = "<img src=x onerror=alert(1)>"


def run_of(rows: list[dict[str, Any]]) -> RunData:
    return RunData(Path("run"), "run", {}, {}, rows, [])


def by_name(rows: list[dict[str, Any]]) -> dict[str, MetricCurve]:
    return {curve.metric.name: curve for curve in metric_curves(run_of(rows))}


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption>([^<]+) <small>", page)


def test_metrics_are_drawn_in_the_lists_order_and_unlisted_ones_last() -> None:
    own = {"mine": 1.0, "grad_norm": 0.5, "entropy": 0.2}
    row = {"step": 1, "reward": 0.5, "policies": {"a": own}, "my_method": {"deep": {"er": 2}}}
    assert list(by_name([row])) == [
        "policies/*/entropy",
        "policies/*/grad_norm",
        "policies/*/mine",
        "my_method/deep/er",
    ]


def test_noise_and_detail_are_folded_and_constant_ones_are_a_table() -> None:
    rng = random.Random(1)
    rows = [
        {
            "step": step,
            "policies": {
                "a": {
                    "entropy": 2.0 - step / 20,  # a trend
                    "grad_norm": rng.uniform(0.4, 0.6),  # noise
                    "clipped": 0.0,  # constant
                    "ratio": 1 + step / 100,  # for developers
                }
            },
        }
        for step in range(1, 21)
    ]
    curves = by_name(rows)
    folded = [curve.metric.key for curve in curves.values() if curve.folded and not curve.constant]
    assert folded == ["grad_norm", "ratio"]
    assert [name for name, curve in curves.items() if curve.constant] == ["policies/*/clipped"]
    page = group_curves(run_of(rows), "health")
    shown, _, hidden = page.partition("<details")
    assert titles(shown) == ["entropy"] and titles(hidden) == ["gradient norm", "ratio"]
    assert "2 more curves for developers, or noise" in hidden
    assert "1 more curve that never changed" in hidden and "<td>clipped</td><td>0</td>" in hidden


def test_a_reward_that_stands_still_is_drawn() -> None:
    rows = [{"step": step, "reward": 0.5, "policies": {}} for step in range(1, 20)]
    assert titles(group_curves(run_of(rows), "learning")) == ["reward"]


def test_constant_curves_of_several_policies_tell_each_value() -> None:
    policies = {EVIL: {"learning_rate": 0.5}, "b": {"learning_rate": 0.25}}
    page = group_curves(run_of([{"step": 1, "policies": policies}]), "health")
    assert "&lt;img src=x onerror=alert(1)&gt; <b>0.5</b> · b <b>0.25</b>" in page
    assert EVIL not in page
