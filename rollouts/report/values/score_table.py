"""Score tables: which system of a pool answers which query, as heat maps by cluster and by query.

A method's memory holds one if it has `systems` (names), `scores` (by query id one 0 or 1 per
system) and `clusters` (by query id).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..html import number, table, text
from .heat_map import Row, heat_map
from .texts import whole_text

MAX_ROWS, MAX_TRIPLES = 120, 20  # queries and triples that are shown


@dataclass(frozen=True)
class ScoreTable:
    """Scores [queries, systems], what each query's cluster is, and the triples that came of it."""

    systems: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    clusters: Mapping[str, str]
    triples: Sequence[Mapping[str, Any]] = ()

    @property
    def by_cluster(self) -> list[Row]:
        """The share of its queries that each system answers, by cluster."""
        members: dict[str, list[Sequence[float]]] = {}
        for query, row in self.scores.items():
            members.setdefault(self.clusters[query], []).append(row)
        return [
            (f"{cluster} ({len(rows)})", [sum(own) / len(rows) for own in zip(*rows, strict=True)])
            for cluster, rows in sorted(members.items())
        ]

    @property
    def by_query(self) -> list[Row]:
        """The first queries, those of a cluster together."""
        order = sorted(self.scores, key=lambda query: (self.clusters[query], query))
        return [(f"{self.clusters[q]}: {q}", list(self.scores[q])) for q in order[:MAX_ROWS]]


def score_table_of(state: Any) -> ScoreTable | None:
    """The score table in a part's state; None if it is none."""
    if not isinstance(state, Mapping) or not {"systems", "scores", "clusters"} <= state.keys():
        return None
    rows, triples = state["scores"], state.get("triples", ())
    return ScoreTable(state["systems"], rows, state["clusters"], triples) if rows else None


def score_table_section(scored: ScoreTable) -> str:
    """The table as HTML: by cluster, by query, the systems' names and sums, and some triples."""
    names = [f"{n}: {name}" for n, name in enumerate(scored.systems, 1)]
    sums = [sum(row) for row in zip(*scored.scores.values(), strict=True)]
    chosen = {each["cluster"]: each["system"] for each in scored.triples}
    assigned = [
        " · ".join(cluster for cluster, system in sorted(chosen.items()) if system == name)
        for name in scored.systems
    ]
    systems = table(
        ("", "system", "queries it answers", "assigned to"),
        [
            (number(n), text(name), number(total), text(clusters))
            for n, (name, total, clusters) in enumerate(
                zip(scored.systems, sums, assigned, strict=True), 1
            )
        ],
    )
    queries = scored.by_query
    left_out = len(scored.scores) - len(queries)
    caption = "queries that each system answers" + (f"; {left_out} more" if left_out else "")
    return (
        heat_map(names, "share of a cluster's queries that each system answers", scored.by_cluster)
        + systems
        + f"<details><summary>by query</summary>{heat_map(names, caption, queries)}</details>"
        + _triples(scored.triples)
    )


def _triples(triples: Sequence[Mapping[str, Any]]) -> str:
    """The first triples: what the designer learns to write, and how it came about."""
    if not triples:
        return ""
    entries = "".join(_triple(each) for each in triples[:MAX_TRIPLES])
    return f"<details><summary>{len(triples)} triples</summary>{entries}</details>"


def _triple(triple: Mapping[str, Any]) -> str:
    if triple["accepted"]:
        how = f"rewritten; it scored {triple['base']}, and {triple['refined']} after"
    elif triple["refined"] is not None:
        how = f"its rewriting scored {triple['refined']} and was left"
    else:
        how = f"its rewriting was refused: {triple['fault']}" if triple["fault"] else "as it is"
    head = f"{triple['query']}: {triple['system']}, {how}; scores {triple['base']} as it is"
    words = whole_text(triple["reasoning"]) if triple["reasoning"] else ""
    body = words + whole_text(triple["program"])
    return f"<details><summary>{text(head, 300)}</summary>{body}</details>"
