"""Reads what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one for each step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
