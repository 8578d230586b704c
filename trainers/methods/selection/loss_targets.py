"""Targets of local losses: their bounds, which checkpoints of a training run realise one, and which
teams of such checkpoints are tried. Pure Python, without a model (A-BAD-BO)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MARGIN = 1.1  # the lower bound, as a multiple of the least loss that training reached
Target = Mapping[str, float]  # a loss by component, in nats
Bounds = Mapping[str, tuple[float, float]]  # the least and the largest target by component
Paths = Mapping[str, Sequence[Sequence[float]]]  # by component and training run: losses, in order


@dataclass(frozen=True, order=True)
class Place:
    """A checkpoint of one component: the number of its training run, and its place there."""

    run: int
    at: int


def matching_loss(loss: float, target: float) -> tuple[float, float]:
    """((l - tau)^2, 2 (l - tau)): the matching loss, and the factor of the local gradient in its
    own. Above the target a step goes down the local loss, below it up."""
    return (loss - target) ** 2, 2 * (loss - target)


def reached(loss: float, target: float, tolerance: float) -> bool:
    """Is |l - tau| / tau at most the tolerance? Raises `ValueError` for a target of 0 or less."""
    if target <= 0:
        raise ValueError(f"target {target}: a loss above 0 expected")
    return abs(loss - target) <= tolerance * target


def bounds(
    least: Target, factor: float, most: Target | None = None
) -> dict[str, tuple[float, float]]:
    """By component (1.1 l_min, factor x l_min): where targets are looked for.

    Args:
        least: the least loss that training reached, l_min.
        factor: b, above 1.1.
        most: the loss before training, which no checkpoint is above: the upper bound ends there.

    Where training gained less than the margin, the lower bound is l_min itself.
    """
    found = {}
    for name, low in least.items():
        high = factor * low if most is None else min(factor * low, most[name])
        found[name] = (MARGIN * low if MARGIN * low < high else low, high)
    return found


def nearest(losses: Sequence[float], target: float) -> int:
    """The place of the checkpoint with the least matching loss, the earlier of equal ones."""
    return min(range(len(losses)), key=lambda at: matching_loss(losses[at], target)[0])


def preimages(paths: Paths, target: Target) -> dict[str, list[Place]]:
    """By component the checkpoint of every training run that is nearest to the target."""
    return {
        name: [Place(run, nearest(own, target[name])) for run, own in enumerate(runs)]
        for name, runs in paths.items()
    }


def combinations(
    places: Mapping[str, Sequence[Place]], count: int, seed: int
) -> list[dict[str, Place]]:
    """Up to `count` different teams, a place of every component in each: all of them if there are
    no more, else drawn by the seed."""
    options = [list(dict.fromkeys(own)) for own in places.values()]
    total = math.prod(map(len, options))
    every = itertools.product(*options)
    drawn = (
        list(every)
        if total <= count
        else [_numbered(options, at) for at in random.Random(seed).sample(range(total), count)]
    )
    return [dict(zip(places, team, strict=True)) for team in drawn]


def _numbered(options: Sequence[Sequence[Place]], number: int) -> tuple[Place, ...]:
    """The team of this number, counted as `itertools.product` counts."""
    team = []
    for own in reversed(options):
        number, at = divmod(number, len(own))
        team.append(own[at])
    return tuple(reversed(team))
