"""Plain Python values as JSON and back: tuples, sets and keys that are not text survive."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """Python values as JSON values from which `unplain` restores them: tuples, sets and keys that
    are not text survive."""
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
