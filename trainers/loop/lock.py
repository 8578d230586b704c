"""The lock of a run folder: one run owns it, from its first touch to its end.

`flock` holds while the owner lives and goes with it. File systems that several machines share do
not always share `flock`: there the owner's record, which it renews every few seconds, tells others
that it is alive. Whether it is renewed is watched, not computed from clocks, which differ between
machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ...rollouts.files import fsync

LOCK = ".marlora-lock"
BEAT = 5.0  # seconds between two renewals of the record
SILENCE = 60.0  # seconds without a renewal after which an owner on another machine is dead
WRITTEN = 1.0  # seconds in which a new owner writes its record
KEYS = frozenset({"host", "boot", "namespace", "pid", "started", "token", "beat"})


class FolderLock:
    """The lock of one run folder.

    Args:
        folder: exists.
        say: is given a line when the lock of a dead owner is waited for.

    `lost`: who took the folder over, since this process had not renewed its record for long.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.path, self.say = folder, folder / LOCK, say
        self.lost = ""
        self.record = {**this_process(), "token": secrets.token_hex(8), "beat": 0}
        self._file: int | None = None
        self._end = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self) -> None:
        """Own the folder. Raises `SettingError` that names the owner if another run has it."""
        while self._file is None:
            file, is_new = self._open()
            try:
                if self._locked(file) and self._is_current(file):
                    if not is_new:
                        self._wait_for_silence(file)
                    self._write(file)
                    self._file, file = file, -1
            finally:
                if file >= 0:
                    os.close(file)
        fsync(self.folder)
        self._end.clear()
        self._beats = threading.Thread(target=self._renew, name="marlora-lock", daemon=True)
        self._beats.start()

    def _open(self) -> tuple[int, bool]:
        """The file, and whether it was created here: the one who creates it is the owner."""
        with contextlib.suppress(FileExistsError):
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), False

    def _locked(self, file: int) -> bool:
        """Whether the file is locked now; False to try again with a new file."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                owner = self._owner(file)
                if not self._is_current(file):
                    return False  # given back meanwhile
                if not is_dead_here(owner):
                    raise self._refusal(owner) from None
                # a process that the dead owner forked still holds the lock
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                return False
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise  # else: a file system without flock; the record alone has to do
        return True

    def _owner(self, file: int) -> dict[str, Any]:
        """The owner's record, which it may be about to write; {} if it died before it did."""
        end = time.monotonic() + WRITTEN
        while not (owner := read_record(file)) and time.monotonic() < end:
            time.sleep(WRITTEN / 20)
        return owner

    def _is_current(self, file: int) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            now, mine = os.stat(self.path), os.fstat(file)
        except FileNotFoundError:
            return False
        return (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino)

    def _wait_for_silence(self, file: int) -> None:
        """Return once the recorded owner is known to be dead. Raises `SettingError` if it is
        alive."""
        owner = self._owner(file)
        if not owner or is_dead_here(owner):
            return
        self.say(
            f"output_dir {self.folder}: {named(owner)} left its lock; watching for {SILENCE:g} s"
            " whether it is alive"
        )
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(BEAT / 5)
            now = self._read_anew()
            if now is None:
                return
            if now and (now["token"], now["beat"]) != (owner["token"], owner["beat"]):
                raise self._refusal(now)
        self._write(file)
        time.sleep(BEAT / 5)  # another machine may have waited beside this one
        now = self._read_anew()
        if now is None or now.get("token") != self.record["token"]:
            raise self._refusal(now or {})

    def _read_anew(self) -> dict[str, Any] | None:
        """The record as it stands, None without a lock; opened again, since network file systems
        look for changes only then."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return read_record(file)
        finally:
            os.close(file)

    def _refusal(self, owner: Mapping[str, Any]) -> SettingError:
        return SettingError(
            f"output_dir {self.folder}: a run is at work there ({named(owner)}); wait for its end,"
            " stop it, or name another folder"
        )

    def _write(self, file: int) -> None:
        data = json.dumps(self.record).encode()
        os.pwrite(file, data.ljust(os.fstat(file).st_size), 0)
        os.fsync(file)

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            file = self._file
            if file is None:
                return
            with contextlib.suppress(OSError):  # a full disk; the next renewal may succeed
                now = self._read_anew()
                if now is None or now.get("token", self.record["token"]) != self.record["token"]:
                    self.lost = named(now) if now else "another process (its lock was deleted)"
                    return
                self.record["beat"] += 1
                self._write(file)

    def check(self) -> None:
        """Raise `SettingError` if another run has taken the folder over."""
        if self.lost:
            raise SettingError(
                f"output_dir {self.folder}: {self.lost} has taken it over, since this process stood"
                f" still for more than {SILENCE:g} s"
            )

    def release(self) -> None:
        """Give the folder back and delete the lock. Idempotent."""
        if self._file is None:
            return
        self._end.set()
        if self._beats is not None:
            self._beats.join(timeout=10)
        if not self.lost and self._is_current(self._file):
            self.path.unlink()
        os.close(self._file)
        self._file = None


def this_process() -> dict[str, Any]:
    """What identifies a process on any machine: host, boot of its kernel, pid and its namespace,
    start."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": started(os.getpid()),
    }


def is_dead_here(owner: Mapping[str, Any]) -> bool:
    """Whether the recorded process ran under this kernel, where its pid can be seen, and has
    ended."""
    mine = this_process()
    seen = all(mine[key] and owner.get(key) == mine[key] for key in ("boot", "namespace"))
    return seen and started(int(owner["pid"])) != owner.get("started")


def started(pid: int) -> str:
    """When the process started, in ticks since the boot; "" if there is none."""
    status = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return status[19] if len(status) > 19 and status[0] not in ("Z", "X") else ""


def read_record(file: int) -> dict[str, Any]:
    """The owner's record in an open lock; {} if there is none that can be read."""
    try:
        record = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) and set(record) >= KEYS else {}


def named(owner: Mapping[str, Any]) -> str:
    """An owner as errors name it."""
    return f"host {owner.get('host', 'unknown')}, pid {owner.get('pid', 'unknown')}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
