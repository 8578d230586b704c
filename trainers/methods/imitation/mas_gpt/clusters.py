"""Clusters of queries that share a system: by what is known of a task, by its text, or by both.

The paper (arXiv:2503.03686) groups by metadata and text embeddings and names neither; here the
text's features are hashed words and n-grams (`agents/text/ngrams.py`), clustered by k-means.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from .....agents.seeds import derive_seed
from .....agents.text.ngrams import ngrams
from .....agents.types import SettingError, Task

SOURCE, TEXT = "source", "text"
ROUNDS = 50  # of k-means at most


def clusters_of(tasks: Sequence[Task], by: Sequence[str], count: int, seed: int) -> dict[str, str]:
    """The cluster of each task, by its id: equal entries of `by` are one cluster.

    Args:
        by: `source` (the task's source), `text` (its prompt), or names of fields of its `meta`.
        count: clusters by text within each group that the other entries give.

    Raises `SettingError` at a task without such a field.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(group_of(task, by), []).append(task)
    if TEXT not in by:
        return {task.id: name for name, own in groups.items() for task in own}
    found: dict[str, str] = {}
    for name, own in groups.items():
        features = torch.tensor([ngrams(task.prompt) for task in own], dtype=torch.float64)
        numbers = k_means(features, count, derive_seed(seed, "clusters", name))
        found |= {task.id: f"{name} {n + 1}" for task, n in zip(own, numbers, strict=True)}
    return {task.id: found[task.id] for task in tasks}


def group_of(task: Task, by: Sequence[str]) -> str:
    """What the entries of `by` besides `text` say of a task. Raises `SettingError` at a field that
    it does not have."""
    return " ".join(_entry(task, field) for field in by if field != TEXT) or "all"


def _entry(task: Task, field: str) -> str:
    if field == SOURCE:
        return task.source
    meta: Mapping[str, object] = task.meta
    if field not in meta:
        raise SettingError(
            f"cluster_by: task {task.id!r} has no meta.{field}; it has {', '.join(meta) or 'none'}"
        )
    return str(meta[field])


def k_means(points: torch.Tensor, count: int, seed: int) -> list[int]:
    """The number of the nearest of at most `count` centres for each row of `points` [n, d].

    Lloyd's rounds from centres drawn by k-means++ (Arthur and Vassilvitskii, 2007); of equally near
    centres the first. Numbers follow the order in which clusters first occur.
    """
    centres = _spread(points, count, random.Random(seed))
    nearest = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(ROUNDS):
        for number in range(len(centres)):
            own = points[nearest == number]
            if len(own):
                centres[number] = own.mean(dim=0)
        again = torch.cdist(points, centres).argmin(dim=1)
        if torch.equal(again, nearest):
            break
        nearest = again
    order = {n: place for place, n in enumerate(dict.fromkeys(nearest.tolist()))}
    return [order[n] for n in nearest.tolist()]


def _spread(points: torch.Tensor, count: int, rng: random.Random) -> torch.Tensor:
    """At most `count` different rows, each drawn in proportion to its squared distance to those
    before it: [k, d]."""
    chosen = [rng.randrange(len(points))]
    while len(chosen) < count:
        away = torch.cdist(points, points[chosen]).min(dim=1).values ** 2
        weights = away.clamp(min=0).where(away > 1e-12, torch.zeros_like(away)).tolist()
        if not any(weights):
            break
        chosen.append(rng.choices(range(len(points)), weights)[0])
    return points[chosen].clone()
