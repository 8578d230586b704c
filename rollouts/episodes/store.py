"""The episode store: episodes as JSON lines, appended and never changed.

A folder of `episodes-00000.jsonl, episodes-00001.jsonl, ...`, one episode per line (its columns:
`codec`), and `values/KEY.json` for every state that episodes played with. A line, and its state,
is on disk before `append` returns.
`datasets.load_dataset("json", data_files="FOLDER/episodes-*.jsonl")` reads the files as they are.
(`datasets` takes a column's type from the first 10 MB: a list that is empty all that way, and then
is not, needs its `features`.)
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ...agents.state import TeamState
from ...agents.types import SettingError, from_json, nearest, to_json
from ..files import AppendLog, LogLocked, series_of, write_text
from ..types import Episode
from .codec import READABLE, SCHEMA, filter_row, pack, unpack

FILTERS = (
    "id",
    "group",
    "kind",
    "parent",
    "follows",
    "split",
    "step",
    "seed",
    "state",
    "stop_reason",
    "task",
)
log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The files of a store cannot be read or written as they are; the message names file, line and
    what to do."""


def encode(episode: Episode) -> bytes:
    """The line of an episode, with its line feed. Raises `StoreError` for what is not JSON."""
    try:
        line = (
            json.dumps(pack(episode), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
            + "\n"
        )
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"episode {episode.id!r} is not made of JSON values ({error}); see its task's meta,"
            " answer and values"
        ) from error
    try:
        return line.encode()
    except UnicodeEncodeError:
        log.warning(
            "episode %r holds text that is not Unicode (a lone surrogate); it is stored as '?'",
            episode.id,
        )
        return line.encode(errors="replace")


class Store:
    """The episodes of a folder, by id. Any number of processes may read while one writes, or
    several that each have a `writer` name. Threads may share one store.

    The first `append` takes the folder's lock (a second writer is refused), cuts off a torn last
    line, which a crash can leave behind, and goes on in the last file. A full disk raises its
    `OSError` and leaves the earlier lines whole (see `files.AppendLog`).

    Args:
        folder: created at the first append.
        max_bytes: a file that has reached this size is closed and the next one begun.
        fsync: False leaves it to the operating system when lines reach the disk.
        writer: letters and digits; writers of different names fill one folder at the same time,
            each its own files `episodes-WRITER-00000.jsonl`. They must not play the same episodes:
            ids are compared within one writer only.
    """

    def __init__(
        self, folder: str | Path, *, max_bytes: int = 64 << 20, fsync: bool = True, writer: str = ""
    ) -> None:
        series, lock = (
            (f"episodes-{writer}-", f".lock-{writer}") if writer else ("episodes-", ".lock")
        )
        self.folder = Path(folder)
        self._log = AppendLog(self.folder, series, lock, _is_line, max_bytes=max_bytes, fsync=fsync)
        self._writing = threading.RLock()
        self._ids: set[str] | None = None  # ids on disk, known to the writer only
        self._states: dict[str, TeamState] = {}  # those on disk, as far as they were met
        if writer and not writer.isalnum():
            raise SettingError(f"store writer {writer!r}: letters and digits expected")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def files(self) -> list[Path]:
        """The files of all writers, in order of their names."""
        return sorted(self.folder.glob("episodes-*.jsonl"))

    def append(self, episode: Episode) -> bool:
        """Write one episode. False, and nothing written, if an episode of this id is stored
        already."""
        return self.extend([episode]) == 1

    def extend(
        self,
        episodes: Sequence[Episode],
        *,
        flush: bool = True,
        lines: Mapping[str, bytes] | None = None,
    ) -> int:
        """Write several with one flush to disk; returns how many were new. All or none of them in
        case of an error. Without `flush` a crash of this process loses none of them, but one of the
        machine may, until `flush` is called. `lines`: what `encode` gives, by id, of those that
        are encoded already."""
        with self._writing:
            known = self._open()
            new = {e.id: e for e in reversed(episodes) if e.id not in known}
            given = lines or {}
            written = [given.get(e.id) or encode(e) for e in episodes if new.get(e.id) is e]
            if written:
                try:
                    for episode in new.values():
                        self._keep_state(episode.state)
                    self._log.append(b"".join(written), flush=flush)
                except BaseException:
                    self.close()
                    raise
            known.update(new)
            return len(written)

    def flush(self) -> None:
        """Bring to disk what was written without. Raises `StoreError` if the disk refuses."""
        with self._writing:
            try:
                self._log.flush()
            except OSError as error:
                self.close()
                raise StoreError(
                    f"{self.folder}: what was written last could not be flushed to disk ({error});"
                    " it is there for those who read, but would not outlast a crash of the machine"
                ) from error

    def ids(self) -> set[str]:
        """Ids of all stored episodes."""
        with self._writing:
            return (
                set(self._ids) if self._ids is not None else {data["id"] for data in self.lines()}
            )

    def read(self, **filters: Any) -> Iterator[Episode]:
        """Stored episodes in order. Filters are columns; all must hold: `step=3`, `split=("eval",
        "test")`, `task="a task's id"`."""
        for name in filters:
            if name not in FILTERS:
                raise SettingError(f"read({name}=...): no such filter; {nearest(name, FILTERS)}")
        choices = {
            name: value if _is_choice(value) else (value,) for name, value in filters.items()
        }
        for data in self.lines():
            row = filter_row(data)
            if all(row.get(name) in values for name, values in choices.items()):
                yield unpack(data, self.state)

    def __iter__(self) -> Iterator[Episode]:
        return self.read()

    def __len__(self) -> int:
        return len(self.ids())

    def state(self, key: str) -> TeamState:
        """The state of this key that stored episodes played with. Raises `StoreError` if it is
        missing or not the one of its name."""
        if key not in self._states:
            path = self._state_path(key)
            try:
                state = from_json(TeamState, json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise StoreError(
                    f"{path}: an episode played with this state, and it cannot be read ({error});"
                    " restore the file"
                ) from error
            if state.key != key:
                raise StoreError(
                    f"{path}: holds another state ({state.key}); the file was altered; restore it"
                )
            self._states[key] = state
        return self._states[key]

    def _keep_state(self, state: TeamState) -> None:
        """Write a state once, durable before an episode names it."""
        if state.key in self._states:
            return
        path = self._state_path(state.key)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(to_json(state), indent=1) + "\n")
        self._states[state.key] = state

    def _state_path(self, key: str) -> Path:
        return self.folder / "values" / f"{key}.json"

    def close(self) -> None:
        """Give the lock back. The store opens again at the next append."""
        self._log.close()
        self._ids = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line as JSON, packed as it is; a torn last line of a writer's last file is left
        out, any other is a `StoreError`.

        What another thread appends through this store meanwhile is not seen.
        """
        with self._writing:
            sizes = {path: path.stat().st_size for path in self.files()}
        last = {series_of(path): path for path in sizes}.values()
        for path, size in sizes.items():
            with path.open("rb") as file:
                line, number = file.readline(size), 1
                while line:
                    following = file.readline(size - file.tell())
                    data = _parse(line)
                    if data is not None:
                        if data["schema"] not in READABLE:
                            what = (
                                f"schema {data['schema']!r}, this version of marlora reads up to"
                                f" {SCHEMA}"
                            )
                            raise StoreError(f"{path}, line {number}: {what}; install a newer one")
                        yield data
                    elif following or path not in last:
                        raise StoreError(
                            f"{path}, line {number}: not an episode; restore the file, or delete"
                            " this line to lose one episode"
                        )
                    else:
                        log.warning("%s, line %d: torn by a crash, left out", path, number)
                    line, number = following, number + 1

    def _open(self) -> set[str]:
        """Take the folder's lock and read the stored ids; nothing if it is open."""
        if self._ids is not None:
            return self._ids
        try:
            self._log.open()
        except LogLocked:
            raise StoreError(
                f"{self.folder}: another process or Store is writing here; one folder, one writer"
            ) from None
        try:
            self._ids = {data["id"] for data in self.lines()}
        except BaseException:
            self.close()
            raise
        return self._ids


def _is_choice(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) and "id" in data and "schema" in data else None


def _is_line(line: bytes) -> bool:
    return _parse(line) is not None
