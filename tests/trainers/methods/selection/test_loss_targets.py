"""Targets of local losses, by the numbers of A-BAD-BO's method sheet."""

from __future__ import annotations

import math

import pytest

from marlora.trainers.methods.selection.loss_targets import (
    Place,
    bounds,
    combinations,
    matching_loss,
    nearest,
    preimages,
    reached,
)


@pytest.mark.parametrize(
    ("target", "value", "factor"), [(0.3, 0.064697, 0.508710), (0.7, 0.021212, -0.291290)]
)
def test_the_matching_loss_goes_down_above_its_target_and_up_below(
    target: float, value: float, factor: float
) -> None:
    """Facts 1 and 2: the cross-entropy of logits (0.2, -0.1) at label 0."""
    loss = math.log(math.exp(0.2) + math.exp(-0.1)) - 0.2
    assert loss == pytest.approx(0.554355, abs=1e-6)
    assert matching_loss(loss, target) == pytest.approx((value, factor), abs=1e-6)


def test_a_target_is_reached_within_a_tenth() -> None:
    """Fact 5: 9.8 % and 10.2 % away from 0.5."""
    assert reached(0.549, 0.5, 0.1) and not reached(0.551, 0.5, 0.1)
    assert reached(0.451, 0.5, 0.1) and not reached(0.449, 0.5, 0.1)
    with pytest.raises(ValueError, match="above 0"):
        reached(0.1, 0.0, 0.1)


def test_bounds_follow_from_the_least_losses() -> None:
    """Fact 6: l_min 0.2 and 0.05, b 5."""
    found = bounds({"a": 0.2, "b": 0.05}, 5.0)
    assert found["a"] == pytest.approx((0.22, 1.0)) and found["b"] == pytest.approx((0.055, 0.25))


def test_bounds_end_at_the_loss_before_training() -> None:
    assert bounds({"a": 0.2}, 5.0, {"a": 0.6})["a"] == pytest.approx((0.22, 0.6))
    assert bounds({"a": 0.2}, 5.0, {"a": 0.21})["a"] == (0.2, 0.21), "hardly anything was learnt"
    assert bounds({"a": 0.2}, 5.0, {"a": 0.2})["a"] == (0.2, 0.2), "nothing was"


def test_a_target_is_realised_by_the_nearest_checkpoint_of_every_run() -> None:
    assert nearest([2.0, 1.0, 0.5, 0.6], 0.54) == 2 and nearest([1.0, 0.5], 0.75) == 0
    paths = {"a": [[2.0, 1.0, 0.1], [2.0, 0.9]], "b": [[3.0], [3.0]]}
    found = preimages(paths, {"a": 0.93, "b": 0.0})
    assert found == {"a": [Place(0, 1), Place(1, 1)], "b": [Place(0, 0), Place(1, 0)]}


def test_teams_are_different_and_drawn_by_the_seed() -> None:
    places = {"a": [Place(n, 1) for n in range(3)], "b": [Place(n, 2) for n in range(4)]}
    every = combinations(places, 12, 0)
    assert len({(team["a"].run, team["b"].run) for team in every}) == 12
    drawn = combinations(places, 5, 7)
    assert len(drawn) == 5 and all(team in every for team in drawn)
    assert len({tuple(team.items()) for team in drawn}) == 5
    assert drawn == combinations(places, 5, 7) and drawn != combinations(places, 5, 8)
    seen = {tuple(team.items()) for seed in range(40) for team in combinations(places, 2, seed)}
    assert len(seen) == 12, "any of them may come"
    twice = {"a": [Place(0, 1), Place(0, 1)], "b": [Place(0, 0)]}
    assert combinations(twice, 5, 0) == [{"a": Place(0, 1), "b": Place(0, 0)}]
