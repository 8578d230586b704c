"""Plain Python values as JSON and back: tuples, sets and keys that are not text survive.

`sandbox/scorer.py`, which can import nothing of marlora, has a copy of `unplain`; a test compares
the two.
"""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A Python value as a JSON value from which `unplain` restores it; a value of another type is
    written as its text."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [plain(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(item) for item in value), key=repr)}
    if value is None or isinstance(value, (str, int, float)):
        return value
    return {"text": str(value)}


def unplain(value: Any) -> Any:
    """The Python value that `plain` wrote."""
    if isinstance(value, list):
        return [unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {unplain(key): unplain(item) for key, item in inner}
    kinds: dict[str, Any] = {"tuple": tuple, "set": set}
    return inner if kind == "text" else kinds[kind](unplain(item) for item in inner)
