"""Logits over steps, as the probabilities they give: curves of a few decisions, a heat map of
many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..charts import Line, chart
from ..html import text
from ..tables import colours

Table = Mapping[str, Mapping[str, float]]  # decision -> option -> logit, or probability
Row = tuple[str, Sequence[float | None]]  # a name and its probability at each point

FEW_DECISIONS, FEW_OPTIONS = 6, 6  # up to which a decision has a chart of its own
MAX_ROWS, MAX_COLUMNS = 120, 48  # of a heat map
TITLED = 2000  # cells up to which each tells its number
MAX_NAME, LETTER = 32, 6.4  # letters of a row's name, and pixels of one
CELL, HEIGHT, NUMBER = 11, 15, 44  # pixels


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
    return _heat_map(steps, *rows_of(decisions, kept, points[-1][1]))


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


def _heat_map(steps: Sequence[int], caption: str, rows: Sequence[Row]) -> str:
    cell = max(CELL, min(28, 560 // len(steps)))
    left = round(LETTER * min(MAX_NAME, max(len(name) for name, _ in rows))) + 8
    width, top = left + cell * len(steps) + NUMBER, HEIGHT + 4
    titled = len(rows) * len(steps) <= TITLED
    drawn = []
    for n, (name, values) in enumerate(rows):
        y = top + n * HEIGHT
        drawn.append(
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{text(_short(name))}'
            f"<title>{text(name, 200)}</title></text>"
        )
        drawn += [
            _cell(left + k * cell, y, cell, value, f"step {step}, {name}" if titled else "")
            for k, (step, value) in enumerate(zip(steps, values, strict=True))
            if value is not None
        ]
        drawn.append(
            f'<text x="{left + cell * len(steps) + 6}" y="{y + 11}">{_last(values)}</text>'
        )
    ends = "".join(
        f'<text x="{x}" y="11" text-anchor="{anchor}">{label}</text>'
        for x, anchor, label in (
            (left, "start", f"step {steps[0]}"),
            (left + cell * len(steps), "end", str(steps[-1])),
        )[: min(len(steps), 2)]
    )
    head = f"<figcaption>{text(caption)} <small>0 is empty, 1 is full</small></figcaption>"
    return (
        f'<figure class="heat">{head}<div class="inner" tabindex="0"><svg width="{width}"'
        f' height="{top + HEIGHT * len(rows)}" role="img">{ends}{"".join(drawn)}</svg></div>'
        "</figure>"
    )


def _cell(x: int, y: int, size: int, value: float, name: str) -> str:
    title = f"<title>{text(name, 200)}: {value:.3f}</title>" if name else ""
    place = f'x="{x}" y="{y}" width="{size - 1}" height="{HEIGHT - 1}"'
    return f'<rect {place} fill-opacity="{value:.2f}">{title}</rect>'


def _last(values: Sequence[float | None]) -> str:
    return "" if values[-1] is None else f"{values[-1]:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
