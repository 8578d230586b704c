"""Scores of a chooser by hand, and weights that do not fit."""

from __future__ import annotations

import math
import re

import pytest

from marlora.agents.programs.chooser import Chooser, ControllerShape, packed, unpacked

SHAPE = ControllerShape(layers=2, operators=3, features=2, hidden=1)
WEIGHTS = {
    "1.hidden.weight": packed([1.0, -0.5]),
    "1.hidden.bias": packed([0.25]),
    "1.score.weight": packed([2.0, 0.0, -1.0]),
    "1.score.bias": packed([0.0, 1.0, 0.5]),
    "2.hidden.weight": packed([0.0, 0.0, 1.0, 1.0]),
    "2.hidden.bias": packed([0.0]),
    "2.score.weight": packed([1.0, 1.0, 4.0]),
    "2.score.bias": packed([0.0, 0.0, 0.0]),
}


def test_scores_by_hand() -> None:
    chooser = Chooser(WEIGHTS, SHAPE)
    hidden = math.tanh(0.5 - 0.25 + 0.25)
    assert chooser.scores(1, [0.5, 0.5]) == pytest.approx([2 * hidden, 1.0, 0.5 - hidden])
    later = math.tanh(0.75)  # the query counts nothing here, the layer before 1 each
    assert chooser.scores(2, [9.0, 9.0, 0.5, 0.25]) == pytest.approx([later, later, 4 * later])


def test_without_weights_all_operators_are_alike() -> None:
    for nothing in (None, {}):
        assert Chooser(nothing, SHAPE).scores(1, [0.5, 0.5]) == [0.0, 0.0, 0.0]


def test_a_layer_has_the_inputs_of_those_before() -> None:
    with pytest.raises(ValueError, match="layer 2: expected 4 inputs, got 2"):
        Chooser(WEIGHTS, SHAPE).scores(2, [0.5, 0.5])


def test_numbers_come_back_as_float32() -> None:
    assert unpacked(packed([0.5, -2.0, 3e20])) == pytest.approx((0.5, -2.0, 3e20))
    assert unpacked(packed([0.1]))[0] == pytest.approx(0.1, rel=1e-7)
    with pytest.raises(ValueError, match=r"."):
        unpacked("no base64!")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"1.score.bias": packed([1.0])}, r"1.score.bias: expected \(3,\) numbers, got 1"),
        ({"1.score.bias": packed([1.0, math.nan, 0.0])}, "1.score.bias: a number is not finite"),
        ({"1.score.bias": "?"}, "1.score.bias: expected float32 numbers in base64"),
        ({"1.score.bias": 3}, "1.score.bias: expected float32 numbers in base64"),
        ({"3.score.bias": packed([1.0])}, "'3.score.bias' is no tensor of this controller"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, object], fault: str) -> None:
    assert SHAPE.fault(WEIGHTS) is None
    found = SHAPE.fault({**WEIGHTS, **change})
    assert found is not None and re.search(fault, found), found


def test_a_tensor_that_is_missing() -> None:
    some = {name: text for name, text in WEIGHTS.items() if name != "2.hidden.bias"}
    assert "'2.hidden.bias' is missing" in str(SHAPE.fault(some))
    assert "expected weights by name" in str(SHAPE.fault([1.0]))
