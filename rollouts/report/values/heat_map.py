"""Heat maps: named rows of shares from 0 to 1, a cell for each column, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from ..html import text

Row = tuple[str, Sequence[float | None]]  # a name and its share in each column; None is no cell

TITLED = 2000  # cells up to which each tells its number
MAX_NAME, LETTER = 32, 6.4  # letters of a row's name, and pixels of one
CELL, HEIGHT, NUMBER = 11, 15, 44  # pixels


def heat_map(
    columns: Sequence[str], caption: str, rows: Sequence[Row], ends: tuple[str, str] | None = None
) -> str:
    """A figure with a row for each entry and, at its right, the number of its last cell.

    Args:
        columns: what a cell's title says of its place, before the row's name.
        ends: what stands above the first and the last column; None numbers the columns 1, 2, ...
    """
    cell = max(CELL, min(28, 560 // len(columns)))
    left = round(LETTER * min(MAX_NAME, max(len(name) for name, _ in rows))) + 8
    width, top = left + cell * len(columns) + NUMBER, HEIGHT + 4
    titled = len(rows) * len(columns) <= TITLED
    drawn = _heads(len(columns), left, cell, ends)
    for n, (name, values) in enumerate(rows):
        y = top + n * HEIGHT
        drawn.append(
            f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{text(_short(name))}'
            f"<title>{text(name, 200)}</title></text>"
        )
        drawn += [
            _cell(left + k * cell, y, cell, value, f"{column}, {name}" if titled else "")
            for k, (column, value) in enumerate(zip(columns, values, strict=True))
            if value is not None
        ]
        if ends is not None:
            drawn.append(
                f'<text x="{left + cell * len(columns) + 6}" y="{y + 11}">{_last(values)}</text>'
            )
    head = f"<figcaption>{text(caption)} <small>0 is empty, 1 is full</small></figcaption>"
    return (
        f'<figure class="heat">{head}<div class="inner" tabindex="0"><svg width="{width}"'
        f' height="{top + HEIGHT * len(rows)}" role="img">{"".join(drawn)}</svg></div>'
        "</figure>"
    )


def _heads(count: int, left: int, cell: int, ends: tuple[str, str] | None) -> list[str]:
    """What stands above the columns."""
    if ends is None:
        every = 1 if cell >= 15 else 5
        return [
            f'<text x="{left + k * cell + cell // 2}" y="11" text-anchor="middle">{k + 1}</text>'
            for k in range(count)
            if k % every == 0
        ]
    places = ((left, "start", ends[0]), (left + cell * count, "end", ends[1]))
    return [
        f'<text x="{x}" y="11" text-anchor="{anchor}">{text(label)}</text>'
        for x, anchor, label in places[: min(count, 2)]
    ]


def _cell(x: int, y: int, size: int, value: float, name: str) -> str:
    title = f"<title>{text(name, 200)}: {value:.3f}</title>" if name else ""
    place = f'x="{x}" y="{y}" width="{size - 1}" height="{HEIGHT - 1}"'
    return f'<rect {place} fill-opacity="{value:.2f}">{title}</rect>'


def _last(values: Sequence[float | None]) -> str:
    return "" if values[-1] is None else f"{values[-1]:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
