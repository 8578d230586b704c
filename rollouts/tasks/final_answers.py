"""Final answers in a column of worked solutions: after `####`, in a `\\boxed{}`, or by a regex."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from ...agents.text.answers import extract
from ...agents.types import SettingError, closest

Answer = Callable[[str], "str | None"]
MARK = "####"


def after_hashes(text: str) -> str | None:
    """What stands after the last `####`, without commas: GSM8K's final answer."""
    return text.rsplit(MARK, 1)[1].strip().replace(",", "") if MARK in text else None


def in_the_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{}`: MATH's final answer."""
    return extract(text) if "\\boxed" in text or "\\fbox" in text else None


EXTRACTORS: dict[str, Answer] = {"gsm8k": after_hashes, "boxed": in_the_box}
WHOLE = "none"


def extractor(how: str | None, golds: Iterable[Any]) -> Answer | None:
    """What finds the final answer in a text of the answer column; None takes the column as it is.

    Args:
        how: `gsm8k`, `boxed`, a regular expression (its first group, or all of it, of the last
            match), or `none`. None finds out: `gsm8k` if every one of `golds` has `####`.
        golds: the column, all rows.

    Raises `SettingError` for what is none of these.
    """
    if how is None:
        column = list(golds)
        hashes = bool(column) and all(isinstance(gold, str) and MARK in gold for gold in column)
        return after_hashes if hashes else None
    if how == WHOLE:
        return None
    if isinstance(how, str) and how in EXTRACTORS:
        return EXTRACTORS[how]
    return _by_regex(how)


def _by_regex(how: Any) -> Answer:
    expected = f"expected {', '.join(EXTRACTORS)}, {WHOLE} or a regular expression"
    if not isinstance(how, str) or not how:
        raise SettingError(f"task_args.extract: {expected}, got {how!r}")
    if how.isidentifier() and (close := closest(how, (*EXTRACTORS, WHOLE))):
        raise SettingError(f"task_args.extract: {expected}, got {how!r}; did you mean {close!r}?")
    try:
        pattern = re.compile(how)
    except re.error as error:
        raise SettingError(f"task_args.extract: {expected}, got {how!r} ({error})") from error

    def last(text: str) -> str | None:
        found = None
        for match in pattern.finditer(text):
            found = match[1] if pattern.groups else match[0]
        return found or None

    return last
