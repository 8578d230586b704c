"""A supernet in the report: how far its controller's weights moved, and what is done with each kind
of query, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ....agents.programs.chooser import unpacked
from ..charts import Line, chart
from ..html import is_number, number, table, text
from .heat_map import Row, heat_map

PROBABILITIES = "probabilities"  # of the options, by layer, among what stands for a kind


def as_weights(value: Any) -> list[float] | None:
    """All numbers of packed weights, in the order of their names; None for another value."""
    if not isinstance(value, Mapping) or not value:
        return None
    numbers: list[float] = []
    for name in sorted(value):
        try:
            numbers += unpacked(value[name])
        except (ValueError, TypeError):
            return None
    return numbers


def weights_over_steps(name: str, points: Sequence[tuple[int, Any]]) -> str:
    """How far weights are from the first ones, as a curve of Euclidean distances."""
    known = [(step, found) for step, value in points if (found := as_weights(value)) is not None]
    moved = [(step, math.dist(found, known[0][1])) for step, found in known]
    note = f"distance from the first weights; {len(known[0][1]):,} numbers"
    drawn = chart(f"{name} weights", note, {"": Line(moved)}, {"": "c6"})
    return f'<div class="grid">{drawn}</div>'


def supernet_section(supernet: Any) -> str:
    """What is done with each kind of query, from `supernet` of a summary ({before, after}, each by
    kind): a table, and the options' probabilities as a heat map; "" where there is none."""
    if not isinstance(supernet, Mapping) or not supernet.get("after"):
        return ""
    before, after = supernet.get("before") or {}, supernet["after"]
    keys = [key for key in next(iter(after.values())) if key != PROBABILITIES]
    rows = [
        [text(kind), *(_change(before.get(kind, {}).get(key), own.get(key)) for key in keys)]
        for kind, own in after.items()
    ]
    head = ("kind of query", *(text(key.replace("_", " ")) for key in keys))
    caption = "mean probability of each option by kind of query, before and after"
    drawn = [row for kind in after for row in _rows(kind, before.get(kind, {}), after[kind])]
    both = ("before", "after")
    return table(head, rows) + (heat_map(both, caption, drawn, both) if drawn else "")


def _change(before: Any, after: Any) -> str:
    """`after`, behind what it was before if that differs."""
    if not is_number(before) or before == after:
        return number(after)
    return f"{number(before)} → <b>{number(after)}</b>"


def _rows(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """A row for each option of each layer."""
    old, new = before.get(PROBABILITIES, {}), after.get(PROBABILITIES, {})
    return [
        (f"{kind}, {layer}: {option}", [old.get(layer, {}).get(option), chance])
        for layer, chances in new.items()
        for option, chance in chances.items()
    ]
