"""Differences between two readers' log-probs of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .probes import Probe, ScoredWindow


@dataclass(frozen=True)
class Noise:
    """Of a replica with every adapter off: |server - trainer| in nats, root mean square of all
    tokens and mean of the sampled ones."""

    all: float
    sampled: float


def measured_noise(
    probes: Sequence[Probe], windows: Sequence[ScoredWindow], gaps: Sequence[float]
) -> Noise:
    """The noise in server - trainer of all scored tokens (`gaps`, in nats, one window after the
    other)."""
    sampled: list[float] = []
    place = 0
    for probe, window in zip(probes, windows, strict=True):
        place += len(window.ids) - window.first
        sampled += gaps[place - (len(probe.ids) - probe.prompt) : place]
    return Noise(norm(gaps) / math.sqrt(len(gaps)), mean(sampled))


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def mean(values: Sequence[float]) -> float:
    """Mean of the absolute values."""
    return sum(map(abs, values)) / max(len(values), 1)
