"""Texts as diffs: what was put in, taken out, or stayed, word by word within the lines that
differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from ..html import text
from .workflow_diagram import diagram

MAX_DIFF = 8_000  # characters of a text that is compared
ALIKE = 0.5  # share of words in common from which lines are compared word by word
CONTEXT = 2  # unchanged lines that are shown around a change
WORDS = re.compile(r"\n|[^\S\n]*(?:\w+|[^\w\s])|[^\S\n]+")  # each with the spaces before it


def text_diff(old: str, new: str) -> str:
    """The change from one text to another as HTML: a `pre` with what was taken out as `del`, what
    was put in as `ins`, and unchanged lines far from any change folded into a count."""
    before, after = old[:MAX_DIFF].splitlines(), new[:MAX_DIFF].splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    lines, end = list[str](), 0  # `end`: of the old lines that were shown or skipped
    for group in matcher.get_grouped_opcodes(CONTEXT):
        if group[0][1] > end:
            lines.append(_skipped(group[0][1] - end))
        for what, a, b, c, d in group:
            lines += (
                map(text, before[a:b]) if what == "equal" else _changed(before[a:b], after[c:d])
            )
        end = group[-1][2]
    if lines and end < len(before):
        lines.append(_skipped(len(before) - end))
    if not lines:
        lines.append('<i class="soft">the same lines; only their ends differ</i>')
    if max(len(old), len(new)) > MAX_DIFF:
        lines.append(f'<i class="soft">only the first {MAX_DIFF:,} characters are compared</i>')
    return f'<pre class="diff">{chr(10).join(lines)}</pre>'


def whole_text(value: str) -> str:
    """A text as it is, as HTML, with a diagram if it is a workflow in step language; a word about
    it if it is empty."""
    if not value:
        return '<p class="soft">(empty)</p>'
    return f"<pre>{text(value, MAX_DIFF)}</pre>{diagram(value)}"


def _skipped(count: int) -> str:
    return f'<i class="soft">… {count} unchanged line{"s" if count > 1 else ""} …</i>'


def _changed(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Lines that differ: word by word where they are alike, else the old ones and the new ones."""
    before, after = WORDS.findall("\n".join(old)), WORDS.findall("\n".join(new))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    if not old or not new or matcher.quick_ratio() < ALIKE or matcher.ratio() < ALIKE:
        yield from (f"<del>{text(line)}</del>" for line in old)
        yield from (f"<ins>{text(line)}</ins>" for line in new)
        return
    pieces = []
    for what, a, b, c, d in matcher.get_opcodes():
        out, put = text("".join(before[a:b])), text("".join(after[c:d]))
        if what == "equal":
            pieces.append(out)
        else:
            pieces += [f"<del>{out}</del>"] * bool(out) + [f"<ins>{put}</ins>"] * bool(put)
    yield "".join(pieces)
