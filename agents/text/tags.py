"""Blocks of text between tags, such as `<FEEDBACK>...</FEEDBACK>`, that no text inside them can
close or open: how prompts quote what models and tasks say, and how replies are read.

A tag is a name in capitals between angle brackets. Where quoted text holds one, a backslash is put
behind its bracket; a reply that repeats the text repeats the backslash, so only the tags that the
model itself writes are read.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
# bounded white space: with any number of it, long runs of spaces would take quadratic time
_TAG = re.compile(r"<(\\*)(\s{0,9}/?\s{0,9}[A-Z][A-Z0-9_]*\s{0,9}>)")
_ESCAPED = re.compile(r"<\\(\\*)(\s{0,9}/?\s{0,9}[A-Z][A-Z0-9_]*\s{0,9}>)")


def escape(text: str) -> str:
    """The text with a backslash in everything that looks like a tag; `unescape` takes it out."""
    return _TAG.sub(r"<\\\1\2", text)


def unescape(text: str) -> str:
    """What `escape` was given."""
    return _ESCAPED.sub(r"<\1\2", text)


def block(name: str, text: str) -> str:
    """The text between tags of this name, escaped. Raises `ValueError` unless the name is in
    capitals."""
    return nested(name, escape(text))


def nested(name: str, blocks: str) -> str:
    """Blocks inside a block: `blocks` is taken as it is."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"tag {name!r}: expected capitals, digits and '_'")
    return f"<{name}>\n{blocks}\n</{name}>"


def inside(reply: str, *names: str) -> str | None:
    """What a reply puts between tags, without the white space around it, unescaped; None if it has
    no such pair.

    The first of `names` that has a pair is read, and of several pairs the last: models repeat the
    format before they fill it in. A closing tag that is missing makes no pair.
    """
    text = between(reply, *names)
    return None if text is None else unescape(text)


def between(reply: str, *names: str) -> str | None:
    """As `inside`, not unescaped: for text with an escaping of its own, such as JSON, whose decoded
    texts are to be unescaped."""
    for name in names:
        closed, close, _ = reply.rpartition(f"</{name}>")
        _, opened, text = closed.rpartition(f"<{name}>")
        if close and opened:
            return text.strip()
    return None


def numbered(reply: str, label: str, count: int) -> list[str | None]:
    """The texts of the lines `LABEL 1: text` to `LABEL count: text` of a reply, None where there
    is no such line; the last of several. A line that begins with another number, such as
    `LABEL 10`, is another line."""
    pattern = rf"^[^\w\n]*{re.escape(label)}[ \t]{{1,9}}(\d{{1,4}})(?!\d)[^\w\n:]*:[ \t]*(.*)$"
    lines = {int(m[1]): m[2].strip() for m in re.finditer(pattern, reply, re.M | re.I)}
    return [unescape(lines[n]) if lines.get(n) else None for n in range(1, count + 1)]


def shortened(text: str, words: int = 20) -> str:
    """A text of more than `words` words as its first and last halves: `first ... (...) ... last`;
    other texts as they are (TextGrad, arXiv:2406.07496)."""
    parts = text.split()
    half = words // 2
    if len(parts) <= words:
        return text
    return f"{' '.join(parts[:half])} (...) {' '.join(parts[-half:])}"
