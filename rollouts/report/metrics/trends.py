"""Which curves say something: neither constant nor noise around one level."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FEWEST = 8  # points below which noise cannot be told from a trend
LIKELY = 1.0  # standard normal deviate below which a curve passes for noise
SPIKE = 6.0  # median absolute deviations from the median that are no noise


def is_constant(values: Sequence[float]) -> bool:
    """Whether all values are one, but for rounding."""
    size = max(map(abs, values), default=0.0)
    return not values or max(values) - min(values) <= 1e-9 * size


def is_noise(values: Sequence[float]) -> bool:
    """Whether the values jump around one level: neighbours are as far apart as any two (Bartels'
    rank version of von Neumann's ratio, 1982), and none stands out. Never of few values."""
    if len(values) < FEWEST or is_constant(values):
        return False
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    if max(abs(value - middle) for value in values) > SPIKE * deviation:
        return False
    return smoothness(values) < LIKELY


def smoothness(values: Sequence[float]) -> float:
    """Standard normal deviate of how much closer neighbours are in rank than any two values;
    about 0 for noise, large for a trend or a slow wave."""
    ranks, n = midranks(values), len(values)
    mean = (n + 1) / 2
    spread = math.fsum((rank - mean) ** 2 for rank in ranks)
    ratio = math.fsum((a - b) ** 2 for a, b in zip(ranks, ranks[1:], strict=False)) / spread
    variance = 4 * (n - 2) * (5 * n * n - 2 * n - 9) / (5 * n * (n + 1) * (n - 1) ** 2)
    return (2 - ratio) / math.sqrt(variance)


def midranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    places: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(rank)
    return [sum(places[value]) / len(places[value]) for value in values]
