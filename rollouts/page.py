"""Pieces of an HTML page: escaped text, numbers, tables and curves as inline SVG. No scripts, no style attributes, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("report.css").read_text()
MAX_TEXT = 4000  # characters of one message
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they turn the order of what follows
MAX_POINTS = 120  # of a curve that tell their value when pointed at

Line = Sequence[tuple[int, float]]  # (step, value)


def page(title: str, body: str) -> str:
    """A whole document of HTML `body`. Its policy (CSP) allows the one style sheet by hash and nothing else."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """Any value as text of the page: escaped, control characters made visible, cut at `limit`."""
    raw = str(value)
    cut = f" … ({len(raw) - limit} more characters)" if len(raw) > limit else ""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␦" if c in BIDI else c for c in raw[:limit])
    return html.escape(shown + cut)


def number(value: Any) -> str:
    """A number in few characters, a dash for None, anything else as text."""
    if not is_number(value):
        return "–" if value is None else text(value)
    size = abs(value)
    if isinstance(value, int) or value == 0 or 1000 <= size < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 1e-3 <= size < 1000 else f"{value:.1e}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def section(title: str, body: str, kind: str = "") -> str:
    return f'<section><h2>{title}</h2><div class="{kind}">{body}</div></section>' if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead><tbody>{cells}</tbody></table></div>'


def whisker(mean: float, low: float, high: float) -> str:
    """A mean and its interval on a line from 0 to 1."""
    ends = f'x1="{200 * low:.1f}" y1="8" x2="{200 * high:.1f}" y2="8"'
    return (
        f'<svg class="whisker" viewBox="0 0 200 16" role="img" aria-label="{mean:.3f}">'
        f'<line class="axis" x1="0" y1="8" x2="200" y2="8"/><line class="range" {ends}/>'
        f'<circle cx="{200 * mean:.1f}" cy="8"/></svg>'
    )


def legend(colours: Mapping[str, str]) -> str:
    names = "".join(f'<span class="{colour}">{text(name)}</span>' for name, colour in colours.items())
    return f'<p class="legend">{names}</p>'


def curves(title: str, note: str, lines: Mapping[str, Line], colours: Mapping[str, str]) -> str:
    """One curve per name, smallest and largest value at the side; pointing at a curve tells its value. "" if there is no point."""
    every = [point for line in lines.values() for point in line]
    if not every:
        return ""
    steps, values = [step for step, _ in every], [value for _, value in every]
    start, end, low, high = min(steps), max(steps), min(values), max(values)

    def place(step: int, value: float) -> tuple[float, float]:
        return 44 + 268 * (step - start) / max(end - start, 1), 108 - 96 * ((value - low) / (high - low) if high > low else 0.5)

    body = "".join(_curve(name, line, place, colours[name]) for name, line in lines.items() if line)
    marks = {112: low, 16: high} if high > low else {64: low}
    labels = "".join(f'<text x="40" y="{y}">{number(value)}</text>' for y, value in marks.items())
    labels += f'<text class="start" x="44" y="124">{start}</text>' + (f'<text x="312" y="124">{end}</text>' if end > start else "")
    return (
        f"<figure><figcaption>{text(title)} <small>{text(note)}</small></figcaption>"
        f'<svg viewBox="0 0 320 128"><path class="axis" d="M44 12V108H312"/>{labels}{body}</svg></figure>'
    )


def _curve(name: str, line: Line, place: Callable[[int, float], tuple[float, float]], colour: str) -> str:
    at = " ".join("{:.1f},{:.1f}".format(*place(step, value)) for step, value in line)
    few = len(line) < 8  # then points are drawn too
    dots = []
    for step, value in line[:: max(1, math.ceil(len(line) / MAX_POINTS))]:
        x, y = place(step, value)
        what = f"step {step}, {name + ' ' if name else ''}{number(value)}"
        dots.append(f'<circle class="{"dot" if few else "hidden"}" cx="{x:.1f}" cy="{y:.1f}"><title>{text(what)}</title></circle>')
    return f'<g class="{colour}"><polyline points="{at}"/>{"".join(dots)}</g>'
