"""HTML building blocks of the report: escaped text, numbers, tables, and the document with its
policy (CSP). No style attributes, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
SCRIPT = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
THUMBS = Path(__file__).with_name("thumbs.js").read_text(encoding="utf-8")  # of a live page
MAX_TEXT = 4000  # characters of one message
BIDI = (  # they turn the order of what follows
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
MAX_POINTS = 120  # of a curve that tell their value when pointed at


def page(
    title: str, body: str, data: Any = None, *, follow: bool = False, script: str = SCRIPT
) -> str:
    """A whole document of HTML `body`. Its policy allows the one style sheet and the one script by
    hash, and nothing else.

    `data` goes in as JSON that the script reads; JSON is not run. `follow` lets the script ask the
    server the page came from, and give it thumbs. `script`: "" for a page without any, whose
    policy allows none.
    """
    script += THUMBS if follow else ""
    source = f"'{digest(script)}'" if script else "'none'"
    policy = (
        f"default-src 'none'; style-src '{digest(STYLE)}'; script-src {source}; base-uri"
        " 'none'; form-action 'none'"
    )
    policy += "; connect-src 'self'" if follow else ""
    facts = json.dumps(
        {"follow": follow, **(data or {})},
        ensure_ascii=False,
        separators=(",", ":"),
        allow_nan=False,
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta'
        f' http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light'
        f' dark"><title>{text(title)}</title><style>{STYLE}</style></head>\n<body>{body}\n'
        f"{_scripts(facts, script)}</body></html>\n"
    )


def _scripts(facts: str, script: str) -> str:
    """The data and the script that reads it; "" without a script."""
    data = f'<script type="application/json" id="data">{inert(facts)}</script>'
    return f"{data}\n<script>{script}</script>" if script else ""


def digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def inert(source: str) -> str:
    """JSON that no HTML parser takes for markup: the characters it would look at are escaped."""
    for char in "<>&\u2028\u2029":
        source = source.replace(char, f"\\u{ord(char):04x}")
    return source


def visible(raw: str, limit: int = MAX_TEXT) -> str:
    """Control characters and such as turn the reading order made visible, cut at `limit`. Not
    escaped."""
    cut = f" … ({len(raw) - limit} more characters)" if len(raw) > limit else ""
    if not raw.isprintable():
        raw = "".join(shown(c) for c in raw[:limit])
    return raw[:limit] + cut


def shown(char: str) -> str:
    if ord(char) < 32 and char not in "\n\t":
        return chr(0x2400 + ord(char))
    return "␦" if char in BIDI or 0xD800 <= ord(char) < 0xE000 else char


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """Any value as text of the page: visible, cut, escaped."""
    return html.escape(visible(str(value), limit))


def number(value: Any) -> str:
    """A number in few characters, a dash for None, anything else as text."""
    if not is_number(value):
        return "–" if value is None else text(value)
    size = abs(value)
    if isinstance(value, int) or value == 0 or 1000 <= size < 1e9:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 1e-3 <= size < 1000 else f"{value:.1e}"


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def section(title: str, body: str, kind: str = "", name: str = "") -> str:
    """A part of a group with a heading; "" if there is nothing in it. `name` makes it a target of
    links."""
    at = f' id="{name}"' if name else ""
    return (
        f'<section{at}><h3 class="part">{title}</h3><div class="{kind}">{body}</div></section>'
        if body
        else ""
    )


def group(title: str, body: str, name: str) -> str:
    """One of the page's groups of sections; "" if there is nothing in it."""
    return f'<div class="group" id="{name}"><h2>{title}</h2>{body}</div>' if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already; without any text in `head` the table has none."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f'<th scope="col">{h}</th>' for h in head)
    heads = f"<thead><tr>{names}</tr></thead>" if any(head) else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{heads}<tbody>{cells}</tbody>'
        "</table></div>"
    )


def whisker(mean: float, low: float, high: float) -> str:
    """A mean and its interval on a line from 0 to 1."""
    ends = f'x1="{200 * low:.1f}" y1="8" x2="{200 * high:.1f}" y2="8"'
    return (
        f'<svg class="whisker" viewBox="0 0 200 16" role="img" aria-label="{mean:.3f}">'
        f'<line class="rule" x1="0" y1="8" x2="200" y2="8"/><line class="range" {ends}/>'
        f'<circle cx="{200 * mean:.1f}" cy="8"/></svg>'
    )


def legend(colours: Mapping[str, str]) -> str:
    names = "".join(
        f'<span class="{colour}">{text(name)}</span>' for name, colour in colours.items()
    )
    return f'<p class="legend">{names}</p>'
