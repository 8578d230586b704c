"""Several optimizer updates from one set of episodes: seeded minibatches, and what all of them did
together."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from ...agents.seeds import derive_seed
from .optimizer_step import UpdateResult

T = TypeVar("T")


def minibatches(items: Sequence[T], size: int, epochs: int, seed: int) -> Iterator[list[T]]:
    """Every item once per epoch, `size` at a time, in an order of its own each epoch. The last of
    an epoch may be smaller."""
    for epoch in range(epochs):
        order = list(items)
        random.Random(derive_seed(seed, "minibatches", epoch)).shuffle(order)
        yield from (order[i : i + size] for i in range(0, len(order), size))


def merge_results(updates: Sequence[Mapping[str, UpdateResult]]) -> dict[str, UpdateResult]:
    """One row per policy for several calls of `Learner.learn`: tokens and sequences are summed,
    statistics are the last update's, and an update that was not applied shows."""
    merged: dict[str, UpdateResult] = {}
    for update in updates:
        for policy, now in update.items():
            before = merged.get(policy)
            merged[policy] = now if before is None else _after(before, now)
    return merged


def _after(before: UpdateResult, now: UpdateResult) -> UpdateResult:
    return dataclasses.replace(
        now,
        tokens=before.tokens + now.tokens,
        sequences=before.sequences + now.sequences,
        first_mismatch_kl=before.first_mismatch_kl,
        applied=before.applied and now.applied,
        problem=before.problem or now.problem,
        moved=before.moved if before.moved is not None else now.moved,
    )
