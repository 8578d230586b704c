"""The episode store: episodes as JSON lines, appended and never changed.

A folder of `episodes-00000.jsonl, episodes-00001.jsonl, ...`, one episode per line (its columns:
`codec`), and `values/KEY.json` for every state that episodes played with. A line, and its state,
is on disk before `append` returns.
`datasets.load_dataset("json", data_files="FOLDER/episodes-*.jsonl")` reads the files as they are.
(`datasets` takes a column's type from the first 10 MB: a list that is empty all that way, and then
is not, needs its `features`.)
"""

from __future__ import annotations

import itertools
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
        # id -> where its line begins: known to the writer only
        self._places: dict[str, tuple[Path, int]] | None = None
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
            places = self._open()
            new = {e.id: e for e in reversed(episodes) if e.id not in places}
            given = lines or {}
            written = {e.id: given.get(e.id) or encode(e) for e in episodes if new.get(e.id) is e}
            if written:
                try:
                    for episode in new.values():
                        self._keep_state(episode.state)
                    path, begin = self._log.append(b"".join(written.values()), flush=flush)
                except BaseException:
                    self.close()
                    raise
                for name, line in written.items():
                    places[name] = path, begin
                    begin += len(line)
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
            known = self._places
            return set(known) if known is not None else {data["id"] for data in self.lines()}

    def read(self, **filters: Any) -> Iterator[Episode]:
        """Stored episodes in order. Filters are columns; all must hold: `step=3`, `split=("eval",
        "test")`, `task="a task's id"`.

        The writer finds episodes by their `id` without reading the others."""
        for name in filters:
            if name not in FILTERS:
                raise SettingError(f"read({name}=...): no such filter; {nearest(name, FILTERS)}")
        choices = {
            name: value if _is_choice(value) else (value,) for name, value in filters.items()
        }
        for data in self._lines_of(choices["id"]) if "id" in choices else self.lines():
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
        self._places = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every line as JSON, packed as it is; a torn last line of a writer's last file is left
        out, any other is a `StoreError`.

        What another thread appends through this store meanwhile is not seen.
        """
        return (data for _, _, data in self._placed_lines())

    def _lines_of(self, ids: Collection[str]) -> Iterator[dict[str, Any]]:
        """The lines of these ids, in order; all lines where it is not known which these are."""
        with self._writing:
            places = self._places or {}
            found = sorted((*places[name], name) for name in set(ids) if name in places)
        if len(found) < len(set(ids)):
            yield from self.lines()  # another process may have written them
            return
        for path, of_path in itertools.groupby(found, lambda place: place[0]):
            with path.open("rb") as file:
                for _, begin, name in of_path:
                    file.seek(begin)
                    data, where = _parse(file.readline()), f"{path}, byte {begin}"
                    if data is None or data["id"] != name:
                        raise StoreError(
                            f"{where}: expected episode {name!r}; the file was altered while this"
                            " process writes it; restore it"
                        )
                    yield _checked(data, where)

    def _placed_lines(self) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """`lines`, with the file and the byte where each begins."""
        with self._writing:
            sizes = {path: path.stat().st_size for path in self.files()}
        last = {series_of(path): path for path in sizes}.values()
        for path, size in sizes.items():
            with path.open("rb") as file:
                line, number, begin = file.readline(size), 1, 0
                while line:
                    following = file.readline(size - file.tell())
                    data = _parse(line)
                    if data is not None:
                        yield path, begin, _checked(data, f"{path}, line {number}")
                    elif following or path not in last:
                        raise StoreError(
                            f"{path}, line {number}: not an episode; restore the file, or delete"
                            " this line to lose one episode"
                        )
                    else:
                        log.warning("%s, line %d: torn by a crash, left out", path, number)
                    begin += len(line)
                    line, number = following, number + 1

    def _open(self) -> dict[str, tuple[Path, int]]:
        """Take the folder's lock and find the stored episodes; nothing if it is open."""
        if self._places is not None:
            return self._places
        try:
            self._log.open()
        except LogLocked:
            raise StoreError(
                f"{self.folder}: another process or Store is writing here; one folder, one writer"
            ) from None
        try:
            self._places = {data["id"]: (path, at) for path, at, data in self._placed_lines()}
        except BaseException:
            self.close()
            raise
        return self._places


def _checked(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The line, if this version can read it."""
    if data["schema"] not in READABLE:
        raise StoreError(
            f"{where}: schema {data['schema']!r}, this version of marlora reads up to {SCHEMA};"
            " install a newer one"
        )
    return data


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
