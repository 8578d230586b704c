"""Logits over steps: softmax by hand, curves of a few decisions, a heat map of many."""

from __future__ import annotations

import math

import pytest

from marlora.rollouts.report.values.logits import (
    MAX_COLUMNS,
    MAX_ROWS,
    logits_over_steps,
    probabilities,
    rows_of,
)


def edges(count: int, logit: float) -> dict[str, dict[str, float]]:
    return {f"e{n}": {"on": logit * (n + 1), "off": 0.0} for n in range(count)}


def test_probabilities_by_hand() -> None:
    found = probabilities({"a": {"x": math.log(3), "y": 0.0}, "b": {"x": 1000.0, "y": 1000.0}})
    assert found["a"] == pytest.approx({"x": 0.75, "y": 0.25})
    assert found["b"] == pytest.approx({"x": 0.5, "y": 0.5})


def test_a_few_decisions_have_a_chart_each() -> None:
    made = logits_over_steps("table", [(0, edges(3, 0.0)), (2, edges(3, math.log(3)))])
    assert made.count("<figure>") == 3 and "heat" not in made
    assert "step 2, on 0.75" in made and "step 0, off 0.5" in made and "step 2, off 0.25" in made


def test_thirty_six_edges_are_a_heat_map_of_one_option() -> None:
    steps = [(step, edges(36, step / 36)) for step in range(5)]
    made = logits_over_steps("table", steps)
    assert made.count("<figure") == 1 and "probability of on, by decision" in made
    assert made.count("<rect") == 36 * 5 and "step 0, e0: 0.500" in made
    last = f"{1 / (1 + math.exp(-4)):.3f}"  # e35 at step 4
    assert f"step 4, e35: {last}" in made and f">{last}</text>" in made
    assert 'fill-opacity="0.50"' in made and "style=" not in made


def test_decisions_of_several_options_have_a_row_for_each() -> None:
    table = {f"d{n}": {"a": 0.0, "b": 0.0, "c": 0.0} for n in range(9)}
    told, rows = rows_of(list(table), [probabilities(table)], table)
    assert told == "probability, by decision and option" and len(rows) == 27
    assert rows[0] == ("d0: a", [pytest.approx(1 / 3)]) and rows[26][0] == "d8: c"


def test_a_table_that_grows_has_gaps_before() -> None:
    early, late = edges(8, 1.0), edges(9, 1.0)
    made = logits_over_steps("t", [(0, early), (1, late)])
    assert made.count("<rect") == 8 + 9


def test_many_rows_and_steps_are_thinned_out() -> None:
    few = rows_of([f"e{n}" for n in range(300)], [probabilities(edges(300, 0.0))], edges(300, 1.0))
    assert f"the {MAX_ROWS} of 300 that moved most" in few[0] and len(few[1]) == MAX_ROWS
    made = logits_over_steps("t", [(step, edges(40, step / 100)) for step in range(301)])
    assert made.count("<rect") == 40 * MAX_COLUMNS
    assert ">step 0</text>" in made and ">300</text>" in made


def test_names_are_escaped() -> None:
    table = {f"<b>{n}": {"on": 1.0, "off": 0.0} for n in range(9)}
    made = logits_over_steps("<i>", [(0, table), (1, table)])
    assert "<b>" not in made and "<i>" not in made and "&lt;b&gt;8" in made
