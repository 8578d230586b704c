"""A supernet in the report: weights as a distance, kinds of queries as a table and a heat map."""

from __future__ import annotations

import pytest

from marlora.agents.programs.chooser import packed
from marlora.rollouts.report.values.supernet import as_weights, supernet_section, weights_over_steps


def test_weights_are_known_by_what_they_hold() -> None:
    assert as_weights({"b": packed([1.0]), "a": packed([2.0, 3.0])}) == [2.0, 3.0, 1.0]
    for other in ({}, {"a": "a text"}, {"a": 1.0}, "AAAA", None, {"a": {"on": 1.0}}):
        assert as_weights(other) is None


def test_weights_are_shown_as_a_distance() -> None:
    points = [(0, {"a": packed([0.0, 0.0])}), (1, {"a": packed([3.0, 4.0])})]
    shown = weights_over_steps("supernet", points)
    assert "distance from the first weights; 2 numbers" in shown and "last 5" in shown
    assert packed([3.0, 4.0]) not in shown


def kind(calls: float, chance: float) -> dict[str, object]:
    return {"queries": 3, "calls": calls, "probabilities": {"layer1": {"<b>": chance}}}


def test_kinds_of_queries() -> None:
    shown = supernet_section({"before": {"easy": kind(5, 0.5)}, "after": {"easy": kind(1, 0.875)}})
    assert "5 → <b>1</b>" in shown and "3 →" not in shown
    assert "easy, layer1: &lt;b&gt;" in shown and "0.875" in shown and "<b>:" not in shown


@pytest.mark.parametrize("nothing", [None, {}, {"before": {}, "after": {}}, 3])
def test_runs_without_a_supernet(nothing: object) -> None:
    assert supernet_section(nothing) == ""


def test_a_kind_that_was_not_there_before() -> None:
    shown = supernet_section({"before": {}, "after": {"new": kind(1, 0.25)}})
    assert "0.250" in shown and "→" not in shown
