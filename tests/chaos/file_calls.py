"""Kills at single file-system calls, and what a kill may not leave behind.

Every call of Python that makes, opens for writing, renames or deletes something is announced by an
audit event before it happens; writes and flushes of an open file are not, and are wrapped. A process
that dies at the N-th of them has made N - 1.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marlora.trainers.loop.lock import LOCK

# audit event -> how many paths its first arguments are
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1}
WRITING = os.O_WRONLY | os.O_RDWR


def set_kill(folder: Path, at: int | str, *, half: bool = False) -> Callable[[], int]:
    """Die at the `at`-th call that changes something in the folder (0: never), or at the first of a
    path that holds this text, before it, or `half` way through what it writes or opens a file to
    write. Returns the counter of calls."""
    root, calls = os.path.realpath(folder), [0]

    def is_due(names: list[str]) -> bool:
        inside = [name for name in names if os.path.realpath(name).startswith(root + os.sep)]
        if not inside or Path(inside[0]).name == LOCK:  # renewed every few seconds
            return False
        calls[0] += 1
        return at in inside[0] if isinstance(at, str) else calls[0] == at

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if is_due(changed(event, args)):
            if not (half and event == "open"):
                os.kill(os.getpid(), signal.SIGKILL)
            _let_files_grow(args)

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: int, *data: bytes) -> Any:
            if is_due([os.readlink(f"/proc/self/fd/{file}")]):
                if half and data:
                    real(file, bytes(data[0])[: len(data[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(file, *data)

        return call

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond the limit ends the process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(audit)
    os.write, os.fsync = wrapped(os.write), wrapped(os.fsync)
    return lambda: calls[0]


def changed(event: str, args: tuple[Any, ...]) -> list[str]:
    """The paths that the announced call is about to change."""
    if event == "open":
        return [os.fsdecode(args[0])] if _writes(args) else []
    return [os.fsdecode(each) for each in args[: CHANGES.get(event, 0)] if _is_path(each)]


def _writes(args: tuple[Any, ...]) -> bool:
    return _is_path(args[0]) and bool((args[2] or 0) & WRITING)


def _is_path(value: object) -> bool:
    return isinstance(value, (str, bytes, os.PathLike))


def _let_files_grow(args: tuple[Any, ...], by: int = 40) -> None:
    """No file gets longer than the one that is opened and `by` bytes: the write that would is cut
    off there, and the next one is the process's end."""
    new = bool(args[2] & os.O_TRUNC) or not os.path.exists(args[0])
    size = (0 if new else os.path.getsize(args[0])) + by
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def names(folder: Path) -> set[str]:
    """Every file and folder below this one, but the twins of proofs: which versions are proven
    depends on where a run was resumed, and their twins go as retired versions do."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name for name in found if not re.search(r"-twin-[0-9a-f]{8}(/|$)", name)}
