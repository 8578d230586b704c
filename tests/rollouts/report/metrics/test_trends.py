"""Constant, noise, or something to look at."""

from __future__ import annotations

import math
import random

import pytest

from marlora.rollouts.report.metrics.trends import is_constant, is_noise, midranks, smoothness


def test_ranks_and_smoothness_by_hand() -> None:
    assert midranks([3.0, 1.0, 3.0, 0.0]) == [3.5, 2.0, 3.5, 1.0]
    # ranks 1 2 3 4: neighbours 1 apart, so 3 / 5; variance 4*2*(80-8-9)/(5*4*5*9) = 504/900
    assert smoothness([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2 - 3 / 5) / math.sqrt(504 / 900))


def test_constant_is_constant_but_for_rounding() -> None:
    assert is_constant([]) and is_constant([0.0, 0.0]) and is_constant([0.3, 0.1 + 0.2])
    assert not is_constant([1e-9, 2e-9])


@pytest.mark.parametrize(
    ("curve", "noise"),
    [
        (lambda n, draw: draw, True),
        (lambda n, draw: n * 0.05 + draw, False),  # a trend
        (lambda n, draw: math.sin(n / 5) * 2 + draw, False),  # a wave
        (lambda n, draw: draw + 40 * (n == 20), False),  # a spike
        (lambda n, draw: 1.0, False),  # constant, which is another thing
    ],
)
def test_noise_is_told_from_trends_waves_and_spikes(curve, noise: bool) -> None:  # type: ignore[no-untyped-def]
    """Of 100 draws, at least nine in ten are judged so; a sixth of all noise passes for a trend
    at the deviate 1."""
    found = 0
    for seed in range(100):
        rng = random.Random(seed)
        values = [curve(n, rng.uniform(-0.5, 0.5)) for n in range(60)]
        found += is_noise(values) is noise
    assert found >= (70 if noise else 95)


def test_few_points_are_shown() -> None:
    rng = random.Random(0)
    assert not any(is_noise([rng.random() for _ in range(7)]) for _ in range(100))
