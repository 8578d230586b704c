"""The record of a run: episodes as JSON lines, appended and never changed.

A folder of `episodes-00000.jsonl, episodes-00001.jsonl, ...`, one episode per line. A line is on
disk before `append` returns. `datasets.load_dataset("json", data_files="FOLDER/episodes-*.jsonl")`
reads the files as they are: every line has the same columns with the same types. What has no fixed
shape (an answer, private meta, values, sampling, decisions) stands there as JSON text, an optional
text is "" when absent, an optional number -1, an unscorable reward null. (`datasets` takes a
column's type from the first 10 MB: a list that is empty all that way, and then is not, needs its
`features`.)

A turn is stored as what it adds: `extends` [index, sibling] names an earlier turn, and `messages`
and `prompt_ids` hold only what comes after that turn's prompt and reply. Where `extends` names a
sibling (the same index) the prompt is the same. [-1, 0]: nothing is shared. `Store.read` gives back
what was sent.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ...agents.types import (
    Decision,
    Message,
    Reward,
    Sampling,
    SettingError,
    Task,
    Turn,
    from_json,
    nearest,
    to_json,
)
from ..types import Episode, Usage

SCHEMA = 1
FILTERS = ("id", "group", "parent", "split", "step", "seed", "stop_reason", "task")
log = logging.getLogger(__name__)


class StoreError(RuntimeError):
    """The files of a store cannot be read or written as they are; the message names file, line and
    what to do."""


# one episode <-> one line


def _text(value: Any) -> str:
    return json.dumps(to_json(value), ensure_ascii=False)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pack_message(message: Message) -> dict[str, Any]:
    extra = {
        "name": message.name,
        "tool_calls": to_json(message.tool_calls),
        "tool_call_id": message.tool_call_id,
    }
    extra = {key: value for key, value in extra.items() if value not in (None, [])}
    return {
        "role": message.role,
        "content": message.content,
        "extra": _text(extra) if extra else "",
    }


def _unpack_message(data: Mapping[str, Any]) -> Message:
    extra = json.loads(data["extra"]) if data["extra"] else {}
    return from_json(Message, {"role": data["role"], "content": data["content"], **extra})


def _after(turn: Turn, same_call: bool) -> tuple[tuple[int, ...], tuple[Message, ...]]:
    """Token ids and messages of the chat after `turn`; for another answer to the same call, those
    before it."""
    if same_call:
        return turn.prompt_ids, turn.messages
    return turn.prompt_ids + turn.token_ids, (*turn.messages, Message("assistant", turn.text))


def _extended(turn: Turn, earlier: Iterable[Turn]) -> Turn | None:
    """The earlier turn of this agent's whose ids and messages make the longest beginning of this
    turn's prompt."""
    best, longest = None, (0, 0)
    whole = (len(turn.prompt_ids), len(turn.messages))
    for other in earlier:
        same_call = other.index == turn.index
        ids, messages = _after(other, same_call)
        size = (len(ids), len(messages))
        if other.agent != turn.agent or size <= longest or (same_call and size != whole):
            continue
        if turn.messages[: size[1]] == messages and turn.prompt_ids[: size[0]] == ids:
            best, longest = other, size
    return best


def _pack_turn(turn: Turn, earlier: Iterable[Turn]) -> dict[str, Any]:
    base = _extended(turn, earlier)
    ids, messages = _after(base, base.index == turn.index) if base else ((), ())
    return {
        "index": turn.index,
        "sibling": turn.sibling,
        "agent": turn.agent,
        "taken": turn.taken,
        "source": turn.source,
        "saw_gold": turn.saw_gold,
        "extends": [base.index, base.sibling] if base else [-1, 0],
        "messages": [_pack_message(m) for m in turn.messages[len(messages) :]],
        "text": turn.text,
        "reads": _text(turn.reads),
        "prompt_ids": list(turn.prompt_ids[len(ids) :]),
        "token_ids": list(turn.token_ids),
        "logprobs": [_number(x) for x in turn.logprobs],
        "finish_reason": turn.finish_reason,
        "policy": turn.policy,
        "version": turn.version,
        "sampling": _text(turn.sampling),
    }


def _unpack_turn(data: Mapping[str, Any], earlier: Mapping[tuple[int, int], Turn]) -> Turn:
    index, sibling = data["extends"]
    ids, messages = (
        _after(earlier[index, sibling], index == data["index"]) if index >= 0 else ((), ())
    )
    plain = (
        "index",
        "sibling",
        "agent",
        "taken",
        "source",
        "saw_gold",
        "text",
        "finish_reason",
        "policy",
        "version",
    )
    return Turn(
        **{name: data[name] for name in plain},
        messages=messages + tuple(_unpack_message(m) for m in data["messages"]),
        reads=tuple(json.loads(data["reads"])),
        prompt_ids=ids + tuple(data["prompt_ids"]),
        token_ids=tuple(data["token_ids"]),
        logprobs=tuple(math.nan if x is None else x for x in data["logprobs"]),
        sampling=from_json(Sampling, json.loads(data["sampling"])),
    )


def _pack_reward(reward: Reward) -> dict[str, Any]:
    turn = -1 if reward.turn is None else reward.turn
    return {
        **to_json(reward),
        "value": _number(reward.value),
        "agent": reward.agent or "",
        "turn": turn,
    }


def _unpack_reward(data: Mapping[str, Any]) -> Reward:
    value = math.nan if data["value"] is None else data["value"]
    turn = None if data["turn"] < 0 else data["turn"]
    return Reward(**{**data, "value": value, "agent": data["agent"] or None, "turn": turn})


def pack(episode: Episode) -> dict[str, Any]:
    """An episode as one line's JSON value. NaN and infinities become null, which reads back as
    NaN."""
    turns: list[dict[str, Any]] = []
    seen: dict[tuple[int, int], Turn] = {}
    for turn in episode.turns:
        turns.append(_pack_turn(turn, seen.values()))
        seen.setdefault((turn.index, turn.sibling), turn)
    task = episode.task
    return {
        "schema": SCHEMA,
        "id": episode.id,
        "group": episode.group,
        "parent": episode.parent or "",
        "split": episode.split,
        "step": episode.step,
        "seed": episode.seed,
        "stop_reason": episode.stop_reason,
        "error": "" if episode.error is None else episode.error or "(no message)",
        "answered": episode.output is not None,
        "output": episode.output or "",
        "task": {
            "id": task.id,
            "prompt": task.prompt,
            "answer": _text(task.answer),
            "source": task.source,
            "split": task.split,
            "meta": _text(task.meta),
        },
        "rewards": [_pack_reward(r) for r in episode.rewards],
        "usage": [
            {"agent": agent, **to_json(usage), "seconds": float(usage.seconds)}
            for agent, usage in episode.usage.items()
        ],
        "team_version": _text(episode.team_version),
        "values": _text(episode.values),
        "decisions": _text(episode.decisions),
        "turns": turns,
    }


def unpack(data: Mapping[str, Any]) -> Episode:
    """The episode of one line's JSON value: what `pack` was given."""
    turns: dict[tuple[int, int], Turn] = {}
    ordered = []
    for item in data["turns"]:
        turn = _unpack_turn(item, turns)
        turns.setdefault((turn.index, turn.sibling), turn)
        ordered.append(turn)
    task = {
        **data["task"],
        "answer": json.loads(data["task"]["answer"]),
        "meta": json.loads(data["task"]["meta"]),
    }
    plain = ("id", "group", "split", "step", "seed", "stop_reason")
    return Episode(
        **{name: data[name] for name in plain},
        parent=data["parent"] or None,
        error=data["error"] or None,
        output=data["output"] if data["answered"] else None,
        task=from_json(Task, task),
        rewards=tuple(_unpack_reward(r) for r in data["rewards"]),
        usage={
            u["agent"]: Usage(**{k: v for k, v in u.items() if k != "agent"}) for u in data["usage"]
        },
        team_version=json.loads(data["team_version"]),
        values=json.loads(data["values"]),
        decisions=tuple(from_json(Decision, d) for d in json.loads(data["decisions"])),
        turns=tuple(ordered),
    )


def _encode(episode: Episode) -> bytes:
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
    """Episodes of a folder. Any number may read while one writes, or several that each bear a name
    of their own. Threads may share one.

    The first `append` takes the folder's lock (a second writer is refused), cuts off a torn last
    line, which a crash can leave behind, and goes on in the last file. A full disk raises its
    `OSError` and leaves the earlier lines whole.

    Args:
        folder: made at the first append.
        max_bytes: a file that has reached this size is closed and the next one begun.
        fsync: False trusts the operating system to write in its own time.
        writer: letters and digits; writers of different names fill one folder at the same time,
            each its own files `episodes-WRITER-00000.jsonl`. They must not play the same episodes:
            nobody compares ids while they write.
    """

    def __init__(
        self, folder: str | Path, *, max_bytes: int = 64 << 20, fsync: bool = True, writer: str = ""
    ) -> None:
        self.folder, self.max_bytes, self.fsync = Path(folder), max_bytes, fsync
        self._series, self._lock_name = (
            (f"episodes-{writer}-", f".lock-{writer}") if writer else ("episodes-", ".lock")
        )
        self._writing = threading.RLock()
        self._ids: set[str] | None = None  # ids on disk, known to the writer only
        self._lock: int | None = None
        self._file: int | None = None
        if writer and not writer.isalnum():
            raise SettingError(f"store writer {writer!r}: letters and digits expected")
        self._path = self._numbered(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("episodes-*.jsonl"))

    def _numbered(self, number: int) -> Path:
        return self.folder / f"{self._series}{number:05d}.jsonl"

    def append(self, episode: Episode) -> bool:
        """Write one episode. False, and nothing written, if an episode of this id is stored
        already."""
        return self.extend([episode]) == 1

    def extend(self, episodes: Sequence[Episode]) -> int:
        """Write several with one flush to disk; returns how many were new. All or none of them in
        case of an error."""
        with self._writing:
            known = self._open()
            new = {e.id: e for e in reversed(episodes) if e.id not in known}
            lines = [_encode(e) for e in episodes if new.get(e.id) is e]
            if lines:
                self._write(b"".join(lines))
            known.update(new)
            return len(lines)

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
        wanted = {name: value if _is_choice(value) else (value,) for name, value in filters.items()}
        for data in self.lines():
            row = {**data, "task": data["task"]["id"], "parent": data["parent"] or None}
            if all(row[name] in values for name, values in wanted.items()):
                yield unpack(data)

    def __iter__(self) -> Iterator[Episode]:
        return self.read()

    def __len__(self) -> int:
        return len(self.ids())

    def close(self) -> None:
        """Give the lock back. The store opens again at the next append."""
        for handle in (self._file, self._lock):
            if handle is not None:
                os.close(handle)
        self._file = self._lock = self._ids = None

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
                        if data["schema"] != SCHEMA:
                            what = (
                                f"schema {data['schema']!r}, this version of marlora reads {SCHEMA}"
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
        if self._ids is not None:
            return self._ids
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / self._lock_name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise StoreError(
                f"{self.folder}: another process or Store is writing here; one folder, one writer"
            ) from None
        self._lock = lock
        try:
            if mine := [path for path in self.files() if series_of(path) == self._series]:
                self._path = mine[-1]
                _repair(self._path)
            self._ids = {data["id"] for data in self.lines()}
        except BaseException:
            self.close()
            raise
        return self._ids

    def _write(self, lines: bytes) -> None:
        if self._file is not None and os.fstat(self._file).st_size >= self.max_bytes:
            os.close(self._file)
            self._file = None
        if self._file is None:
            if self._path.exists() and self._path.stat().st_size >= self.max_bytes:
                self._path = self._numbered(int(self._path.stem.rpartition("-")[2]) + 1)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            _sync_folder(self.folder)
        size = os.fstat(self._file).st_size
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            if self.fsync:
                os.fsync(self._file)
        except BaseException:
            try:
                os.ftruncate(self._file, size)  # half a line must not stand before the next one
            finally:
                self.close()  # the next append looks at the files anew
            raise


def series_of(path: Path) -> str:
    """The part of a file's name that one writer's files share."""
    return path.stem.rpartition("-")[0] + "-"


def _is_choice(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, (str, bytes))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) and "id" in data and "schema" in data else None


def _repair(path: Path) -> None:
    """Cut a torn last line off the file; give a whole one its line feed."""
    with path.open("rb+") as file:
        start = end = 0
        line = b""
        for line in file:
            start, end = end, end + len(line)
        if line and _parse(line) is None:
            log.warning(
                "%s: the last line was torn by a crash; cut off, %d bytes", path, end - start
            )
            file.truncate(start)
        elif line and not line.endswith(b"\n"):
            file.seek(end)
            file.write(b"\n")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
