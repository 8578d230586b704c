"""Rows of the logs in the run folder: one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...agents.types import to_json
from ...rollouts import files


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One line of a log. See `checkpoint.append_text`."""
    files.append_text(path, json.dumps(finite(to_json(row)), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null: NaN is not JSON, and other
    readers refuse it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_rows_after(path: Path, step: int) -> None:
    """After a kill, metrics may be ahead of the checkpoint; those steps are done again."""
    if path.exists():
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # the line that the kill tore
        files.write_text(
            path, "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= step)
        )
