"""The list of metrics: one name and one title per thing, found by the keys that lead to it."""

from __future__ import annotations

from collections import Counter

import pytest

from marlora.rollouts.report.metrics.metric import words
from marlora.rollouts.report.metrics.names import (
    METRICS,
    OF_POLICY,
    current,
    metric_of,
    policy_metric,
    title_of,
)
from marlora.trainers.monitoring.alarms import LIMITS


def test_names_and_titles_are_of_one_metric_each() -> None:
    assert max(Counter(metric.name for metric in METRICS).values()) == 1
    assert max(Counter(metric.title for metric in OF_POLICY).values()) == 1
    for metric in METRICS:
        assert metric.help and not metric.help.endswith("."), metric.name
        assert metric.better in ("higher", "lower", "") and metric.title, metric.name


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("reward", "reward"),
        ("policies/anyone/truncated", "truncated"),
        ("policies/a/constant_groups", "constant groups"),
        ("preference/margins/first", "preference margins"),
        ("dropped/solver: saw the answer", "turns dropped"),
        ("policies/a/nobody", None),
        ("policies/a", None),
        ("margins/first", None),
    ],
)
def test_a_metric_is_found_by_its_keys(path: str, title: str | None) -> None:
    found = metric_of(path.split("/"))
    assert (found.title if found else None) == title


def test_what_is_alarmed_about_is_listed() -> None:
    assert all(policy_metric(name) is not None for name in LIMITS)
    assert title_of("constant_groups") == "constant groups" and title_of("my_own") == "my own"
    assert words(("my_method", "share_of")) == "my method share of"


def test_rows_of_earlier_versions_have_todays_names() -> None:
    old = {"step": 1, "text_feedback": {"cut": 2, "refused": 1}, "policies": {"a": {"tokens": 3}}}
    assert current(old) == {
        "step": 1,
        "text_feedback": {"truncated": 2, "refused": 1},
        "policies": {"a": {"tokens": 3}},
    }
