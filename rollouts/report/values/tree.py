"""An archive of candidates as a tree: who was made from whom, left to right, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..html import text
from .archive import Archive, ArchivedCandidate, scores_of

COLUMN, ROW, MARGIN = 84, 42, 26  # pixels between generations, between leaves, around the tree
Places = Mapping[str, tuple[float, float]]


def places_of(archive: Archive) -> dict[str, tuple[float, float]]:
    """Where each candidate stands, (generation, row): one column right of its first parent; leaves
    in rows of their own, a parent amid its children."""
    children: dict[str, list[str]] = {id: [] for id in archive}
    generation: dict[str, int] = {}
    roots: list[str] = []
    for id, candidate in archive.items():  # parents come before their children
        parent = next((p for p in candidate.parents if p in generation), None)
        generation[id] = 0 if parent is None else generation[parent] + 1
        (roots if parent is None else children[parent]).append(id)
    order: list[str] = []
    waiting = roots[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += children[order[-1]][::-1]
    rows: dict[str, float] = {}
    leaves = 0
    for id in order:
        if not children[id]:
            rows[id], leaves = float(leaves), leaves + 1
    for id in reversed(order):
        if children[id]:
            own = [rows[child] for child in children[id]]
            rows[id] = (min(own) + max(own)) / 2
    return {id: (float(generation[id]), rows[id]) for id in archive}


def tree(archive: Archive, anchor: Callable[[ArchivedCandidate], str]) -> str:
    """The tree: a dot for each candidate, with its id and mean score, that leads to `anchor` on the
    page; dashed lines to parents other than the first one."""
    places = places_of(archive)
    width = MARGIN * 2 + COLUMN * max(x for x, _ in places.values())
    height = MARGIN * 2 + ROW * max(y for _, y in places.values())
    edges = "".join(
        _edge(places[parent], places[id], number > 0)
        for id, candidate in archive.items()
        for number, parent in enumerate(candidate.parents)
        if parent in places
    )
    dots = "".join(_dot(c, places[id], anchor(c)) for id, c in archive.items())
    return (
        f'<div class="scroll" tabindex="0"><svg class="tree" width="{width:.0f}"'
        f' height="{height:.0f}" role="img"><title>{len(archive)} candidates, each right of the one'
        f" that it was made from</title>{edges}{dots}</svg></div>"
    )


def _point(place: tuple[float, float]) -> tuple[float, float]:
    return MARGIN + COLUMN * place[0], MARGIN + ROW * place[1]


def _edge(parent: tuple[float, float], child: tuple[float, float], other: bool) -> str:
    (x, y), (u, v) = _point(parent), _point(child)
    middle = (x + u) / 2
    dashed = ' stroke-dasharray="3 3"' if other else ""
    curve = f"{middle:.0f} {y:.1f} {middle:.0f} {v:.1f} {u:.0f} {v:.1f}"
    return f'<path{dashed} d="M{x:.0f} {y:.1f}C{curve}"/>'


def _dot(candidate: ArchivedCandidate, place: tuple[float, float], anchor: str) -> str:
    x, y = _point(place)
    mean = (
        "lost" if candidate.fault else "" if math.isnan(candidate.mean) else f"{candidate.mean:.3f}"
    )
    told = " · ".join(
        part
        for part in (
            f"{candidate.id}: {candidate.fault or scores_of(candidate)}",
            f"by {candidate.proposer}" if candidate.proposer else "",
            candidate.note,
        )
        if part
    )
    return (
        f'<a href="#{anchor}" class="{candidate.standing}"><title>{text(told, 300)}</title>'
        f'<circle cx="{x:.0f}" cy="{y:.1f}"/><text x="{x:.0f}" y="{y - 9:.1f}">'
        f'{text(candidate.id, 8)}</text><text class="score" x="{x:.0f}" y="{y + 17:.1f}">{mean}'
        "</text></a>"
    )
