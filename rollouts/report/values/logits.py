"""Logits over steps, as the probabilities they give: curves of a few decisions, a heat map of
many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..charts import Line, chart
from ..tables import colours
from .heat_map import Row, heat_map

Table = Mapping[str, Mapping[str, float]]  # decision -> option -> logit, or probability

FEW_DECISIONS, FEW_OPTIONS = 6, 6  # up to which a decision has a chart of its own
MAX_ROWS, MAX_COLUMNS = 120, 48  # of a heat map


def probabilities(table: Table) -> dict[str, dict[str, float]]:
    """P(option) by decision: the softmax of each decision's logits."""
    found = {}
    for decision, row in table.items():
        top = max(row.values())
        weights = {option: math.exp(logit - top) for option, logit in row.items()}
        total = math.fsum(weights.values())
        found[decision] = {option: weight / total for option, weight in weights.items()}
    return found


def logits_over_steps(name: str, points: Sequence[tuple[int, Table]]) -> str:
    """Probabilities of a table's options at each step, as HTML."""
    tables = [(step, probabilities(table)) for step, table in points]
    decisions = list(dict.fromkeys(d for _, table in tables for d in table))
    most = max(len(row) for _, table in tables for row in table.values())
    if len(decisions) <= FEW_DECISIONS and most <= FEW_OPTIONS and len(tables) > 1:
        return f'<div class="grid">{"".join(_curves(name, d, tables) for d in decisions)}</div>'
    steps = _spread([step for step, _ in tables])
    kept = [table for step, table in tables if step in set(steps)]
    caption, rows = rows_of(decisions, kept, points[-1][1])
    ends = (f"step {steps[0]}", str(steps[-1]))
    return heat_map([f"step {step}" for step in steps], caption, rows, ends)


def _curves(name: str, decision: str, tables: Sequence[tuple[int, Table]]) -> str:
    options = list(dict.fromkeys(o for _, table in tables for o in table.get(decision, {})))
    lines = {
        option: Line([(s, t[decision][option]) for s, t in tables if option in t.get(decision, {})])
        for option in options
    }
    title = decision or name
    return chart(title, "probability", lines, colours(options), own_legend=True)


def rows_of(
    decisions: Sequence[str], tables: Sequence[Table], logits: Table
) -> tuple[str, list[Row]]:
    """What the rows of a heat map mean, and the rows: one for each decision where all choose
    between the same two options, else one for each option."""
    pair = _common_pair(logits)
    if pair:
        caption = f"probability of {pair}, by decision"
        named = [(decision, decision, pair) for decision in decisions]
    else:
        caption = "probability, by decision and option"
        named = [
            (f"{d}: {o}" if d else o, d, o)
            for d in decisions
            for o in dict.fromkeys(o for table in tables for o in table.get(d, {}))
        ]
    rows: list[Row] = [(name, [t.get(d, {}).get(o) for t in tables]) for name, d, o in named]
    if len(rows) > MAX_ROWS:
        caption += f"; the {MAX_ROWS} of {len(rows)} that moved most"
        moved = sorted(range(len(rows)), key=lambda n: -_move(rows[n][1]))[:MAX_ROWS]
        rows = [rows[n] for n in sorted(moved)]
    return caption, rows


def _common_pair(logits: Table) -> str:
    """The option to show where all decisions have the same two: the one whose logit is not fixed
    to 0; "" where they differ."""
    sets = {frozenset(row) for row in logits.values()}
    if len(sets) != 1 or len(next(iter(sets))) != 2 or len(logits) < 2:
        return ""
    options = list(next(iter(logits.values())))
    moving = [o for o in options if any(row[o] for row in logits.values())]
    return (moving or options)[0]


def _move(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `MAX_COLUMNS` of the steps, evenly spread, first and last included."""
    if len(steps) <= MAX_COLUMNS:
        return list(steps)
    last = MAX_COLUMNS - 1
    return [steps[round(n * (len(steps) - 1) / last)] for n in range(MAX_COLUMNS)]
