"""Files of tasks as rows: JSONL, JSON, CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...agents.types import SettingError

HELD_OUT = ("eval", "test", "validation")  # names of a held-out split; the first that is there


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split: those named `train*`, and those named `eval*`, else `test*`,
    else `validation*`. Raises `SettingError` if there are none of a split."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in READERS]

    def named(start: str) -> list[Path]:
        return [path for path in files if path.stem.startswith(start)]

    parts = {
        "train": named("train"),
        "eval": next((found for found in map(named, HELD_OUT) if found), []),
    }
    if not all(parts.values()):
        if not files and any(path.suffix in READERS for path in folder.rglob("*")):
            raise SettingError(
                f"tasks {str(folder)!r}: its files are in folders of their own, as in a copy of a"
                f" data set of the hub; name that hub:{folder}"
            )
        raise SettingError(
            f"tasks {str(folder)!r}: expected files train* and eval* (or test*, validation*),"
            f" {', '.join(READERS)}, in the folder; found"
            f" {', '.join(path.name for path in files) or 'none of these kinds'}. A single file is"
            " cut in two by itself: name the file"
        )
    return parts


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each by column. Raises `SettingError` naming the file and the line."""
    if path.suffix not in READERS:
        raise SettingError(
            f"tasks {str(path)!r}: cannot read {path.suffix!r}; expected {', '.join(READERS)}; with"
            " pandas, TABLE.to_json('tasks.jsonl', orient='records', lines=True) writes one"
        )
    rows = READERS[path.suffix](path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingError(f"tasks {str(path)!r}: expected one mapping of columns per task")
    if not rows:
        raise SettingError(f"tasks {str(path)!r}: no rows; expected columns prompt and answer")
    return rows


def _text(path: Path) -> str:
    """The text of a file of tasks in UTF-8, without a byte order mark."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise SettingError(
            f"tasks {str(path)!r}, line {line}, byte {byte}: not UTF-8 (0x{data[error.start]:02x});"
            " save the file as UTF-8"
        ) from error


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SettingError(
                    f"tasks {str(path)!r}, line {number}: not JSON ({error})"
                ) from error
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise SettingError(
            f"tasks {str(path)!r}: not JSON ({error}); one row per line is .jsonl"
        ) from error


def _read_csv(path: Path) -> list[Any]:
    """Rows under a first line of column names; every value is a text."""
    rows = list(csv.DictReader(io.StringIO(_text(path), newline="")))
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise SettingError(
                f"tasks {str(path)!r}, row {number}: not as many values as the first line has"
                " columns; a value with commas or line breaks stands in double quotes"
            )
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SettingError(f"tasks {str(path)!r}: not Parquet ({error})") from error


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
