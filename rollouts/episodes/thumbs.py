"""Thumbs: what people think of the episodes of a run, one JSON line each in its `thumbs.jsonl`.

A line: `{"episode": ID, "thumb": 1, "time": "2026-01-31T12:00:00+00:00"}`; 1 is up, -1 down, 0
takes an earlier one back. The last line about an episode counts. `marlora report --follow` writes
them; a run with `episodes` and `thumbs` learns from them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ..files import repair_last_line

FILE = "thumbs.jsonl"
UP, DOWN, NONE = 1, -1, 0


def give_thumb(run: Path, episode: str, thumb: int) -> None:
    """Append a thumb to a run's file; it is on disk when this returns. Several processes may: each
    waits for the other's line. A line that a crash left half written is cut off first."""
    if thumb not in (UP, DOWN, NONE):
        raise ValueError(f"thumb: expected 1, -1 or 0, got {thumb!r}")
    row = {
        "episode": episode,
        "thumb": thumb,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = run / FILE
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        repair_last_line(path, _is_whole)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_thumbs(run: Path) -> dict[str, int]:
    """1 or -1 by the id of each episode that has a thumb; none without a file. Raises
    `SettingError` for a line that is no thumb, unless it is the last one, which a crash may have
    torn."""
    path, found = run / FILE, dict[str, int]()
    if not path.is_file():
        return found
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not _is_whole(line):
            if number == len(lines):
                break
            raise SettingError(
                f"{path}, line {number}: expected an episode and a thumb of 1, -1 or 0; mend the"
                " line or delete it"
            )
        row = json.loads(line)
        found[row["episode"]] = row["thumb"]
    return {episode: thumb for episode, thumb in found.items() if thumb != NONE}


def _is_whole(line: bytes) -> bool:
    """Is it the line of a thumb?"""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("episode"), str)
        and type(row.get("thumb")) is int
        and row["thumb"] in (UP, DOWN, NONE)
    )
