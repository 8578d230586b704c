"""Fitness: a program's score with its bootstrap interval, as ADAS shows it to its proposer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 100_000


@dataclass(frozen=True)
class Fitness:
    """Median and 95 % interval of the mean over resampled tasks, in percent."""

    low: float
    high: float
    median: float

    def __str__(self) -> str:
        return (
            f"95 % bootstrap interval: ({self.low:.1f} %, {self.high:.1f} %), median:"
            f" {self.median:.1f} %"
        )


def fitness(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Fitness:
    """The bootstrap of the mean of `scores` [n] (0 to 1): `resamples` draws of n with
    replacement, by a generator of this seed. Raises `ValueError` without scores."""
    if not scores:
        raise ValueError("fitness: no scores")
    return _bootstrap(tuple(scores), seed, resamples)


@functools.lru_cache(maxsize=1024)  # the whole archive is shown in every generation
def _bootstrap(scores: tuple[float, ...], seed: int, resamples: int) -> Fitness:
    values, generator = torch.tensor(scores, dtype=torch.float64), torch.Generator()
    generator.manual_seed(seed)
    means, part = list[torch.Tensor](), max(1, 2_000_000 // len(scores))
    for start in range(0, resamples, part):
        count = min(part, resamples - start)
        drawn = torch.randint(len(scores), (count, len(scores)), generator=generator)
        means.append(values[drawn].mean(dim=1))
    shares = torch.tensor([0.025, 0.975, 0.5], dtype=torch.float64)
    low, high, median = (100 * torch.quantile(torch.cat(means), shares)).tolist()
    return Fitness(low, high, median)
