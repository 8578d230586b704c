"""Estimators and tests by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from marlora.rollouts.evaluation.statistics import (
    holm,
    majority_at_k,
    pass_at_k,
    quantile,
    sign_flip_p,
)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # C(3, 2) of C(4, 2) pairs miss it
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 1, 4) == 1 and pass_at_k(5, 4, 2) == 1
    with pytest.raises(ValueError, match="k <= samples"):
        pass_at_k(2, 1, 3)


def test_majority_at_k_by_hand() -> None:
    outputs, scores = ["7", "The answer is 8.", "8.0", None], [1.0, 0.0, 0.0, 0.0]
    assert majority_at_k(outputs, scores, 1) == 0.25
    assert majority_at_k(outputs, scores, 3) == 0  # 8 twice, 7 once; the fourth makes no block
    assert majority_at_k(["8", "7", "7"], [0.0, 1.0, 1.0], 3) == 1
    assert majority_at_k([None, "."], [0.0, 0.0], 2) == 0
    ties = [majority_at_k(["7", "8"], [1.0, 0.0], 2, seed) for seed in range(40)]
    assert 5 < sum(ties) < 35, "a tie is drawn"


def test_signs_of_equal_size_are_the_exact_sign_test() -> None:
    # 5 gained, 1 lost: P(at most 1 of 6) = (1 + 6) / 64, twice
    assert sign_flip_p([1, 1, 1, 1, 1, -1, 0, 0]) == pytest.approx(14 / 64)
    assert sign_flip_p([0.0, 0.0]) == 1 and sign_flip_p([1.0, -1.0]) == 1
    assert sign_flip_p([1.0] * 74 + [-1.0] * 16) < 1e-9


def test_other_differences_are_enumerated_or_drawn() -> None:
    # +-.5 +-1: only (+, +) and (-, -) are as far from 0 as 1.5
    assert sign_flip_p([0.5, 1.0]) == 0.5
    many = [0.5, 1.0] * 10
    assert sign_flip_p(many) == sign_flip_p(many) < 1e-3, "seeded"
    assert sign_flip_p([0.5, -0.5, 1.0, -1.0] * 6) > 0.9


def test_holm_by_hand() -> None:
    # ranked .01 x 3, .02 x 2, .9 x 1
    assert holm({"a": 0.02, "b": 0.9, "c": 0.01}) == pytest.approx({"a": 0.04, "b": 0.9, "c": 0.03})
    assert holm({"a": 0.03, "b": 0.04}) == pytest.approx({"a": 0.06, "b": 0.06}), (
        "never below one that ranks before it"
    )
    assert holm({}) == {} and holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_quantile_by_hand() -> None:
    assert (
        quantile([3, 1, 2, 4], 0.5) == 2
        and quantile([3, 1, 2, 4], 0.95) == 4
        and quantile([5], 0.0) == 5
    )
    assert math.isnan(quantile([], 0.5))
