"""The score table of MAS-GPT: which system of a pool answers which query, and which system each
query is assigned (arXiv:2503.03686). Pure Python."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .....agents.seeds import derive_seed


@dataclass(frozen=True)
class ScoreTable:
    """0/1 scores s[i][j] of K systems on N queries.

    systems: K names, in the order of the pool.
    rows: by query id K scores: 1 where the system answers the query correctly.
    clusters: by query id, the cluster it is in.
    """

    systems: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]
    clusters: Mapping[str, str]

    def sums(self, queries: Iterable[str]) -> list[int]:
        """How many of these queries each system answers correctly: [K]."""
        rows = [self.rows[query] for query in queries]
        return [sum(row[k] for row in rows) for k in range(len(self.systems))]

    def best(self, queries: Iterable[str]) -> int:
        """The system with the highest sum over these queries; of equals the first of the pool."""
        sums = self.sums(queries)
        return sums.index(max(sums))

    def by_cluster(self, queries: Sequence[str] | None = None) -> dict[str, int]:
        """The system of each cluster: j*(c) = argmax_j sum_{i in c} s_ij over these queries (None:
        all). A cluster without one of them takes the best of all of them."""
        members = list(self.rows) if queries is None else list(queries)
        overall = self.best(members)
        own: dict[str, list[str]] = {cluster: [] for cluster in self.clusters.values()}
        for query in members:
            own[self.clusters[query]].append(query)
        return {cluster: self.best(some) if some else overall for cluster, some in own.items()}

    def assigned(self, queries: Sequence[str] | None = None) -> dict[str, int]:
        """By query id the system of its cluster, see `by_cluster`: similar queries have the same
        system, also where it fails one of them."""
        systems = self.by_cluster(queries)
        return {query: systems[self.clusters[query]] for query in self.rows}

    def drawn(self, seed: int) -> dict[str, int]:
        """By query id one of the systems that answer it correctly, drawn for each query by itself:
        the paper's ablation of assignment by clusters. A query that none answers has none."""
        drawn = {}
        for query, row in self.rows.items():
            right = [k for k, score in enumerate(row) if score]
            if right:
                drawn[query] = random.Random(derive_seed(seed, "assign", query)).choice(right)
        return drawn
