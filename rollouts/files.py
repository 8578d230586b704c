"""Durable files: hashes, fsync, atomic replacement, and logs that are only appended to.

A file that is replaced is staged under a dot name in the same folder and renamed, so a reader sees
the old content or the new. A log is appended to by one process, whose lock on the folder keeps a
second one out; a line that a crash left half written is cut off before the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..agents.types import SettingError

log = logging.getLogger(__name__)

_DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_sha256(path: Path) -> str:
    """SHA-256 of an adapter file's tensors: the adapter's hash in `system.json`, equal to
    `Adapters.sha256` of the policy that was saved there. Raises `SettingError` for a file that is
    missing or damaged."""
    from safetensors import deserialize

    try:
        return digest_of(
            (name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data"])
            for name, entry in sorted(deserialize(path.read_bytes()))
        )
    except Exception as error:  # safetensors raises many kinds, for the same cause
        raise SettingError(
            f"{path}: the adapter cannot be read ({type(error).__name__}: {error}); it is damaged"
        ) from error


def digest_of(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> str:
    """SHA-256, in hex, of tensors given one by one as name, dtype (`torch.float32`), shape and
    bytes."""
    digest = hashlib.sha256()
    for name, dtype, shape, data in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def files_sha256(model: str) -> str | None:
    """SHA-256 of a local model's tensor files, by name and content; None for a name of the hub. The
    files are read again only if one was written since."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    stats = ((path, path.stat()) for path in sorted(folder.glob("*.safetensors")))
    return _files_sha256(tuple((path, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in stats))


@functools.lru_cache(maxsize=64)
def _files_sha256(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Of these files, each with what tells that it was written."""
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, errors: str = "strict", *, durable: bool = True) -> None:
    """Replace a file's content atomically, in UTF-8: a reader sees the old content or the new,
    never half of it, also after a crash (not `durable`: of the process, not of the machine).
    `errors`: of the encoding, as in `open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text, encoding="utf-8", errors=errors)
        if durable:
            fsync(staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Append lines to a log: all or none of them. Raises `OSError` that names the file."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, size)  # half a line must not stand before the next one
        raise OSError(
            error.errno, f"{error.strerror}; earlier lines are whole", str(path)
        ) from error


def series_of(path: Path) -> str:
    """The beginning that the names of one log's files share: `episodes-` of
    `episodes-00000.jsonl`."""
    return path.stem.rpartition("-")[0] + "-"


class LogLocked(RuntimeError):
    """Another process, or another `AppendLog` of this one, is writing the log."""


class AppendLog:
    """A log in numbered files `SERIES00000.jsonl, SERIES00001.jsonl, ...` of a folder; one process
    appends, any number read.

    `open` takes the lock, which a second writer is refused (`LogLocked`), and cuts off a torn last
    line. A failed `append` (a full disk: its `OSError`) leaves the earlier lines whole and closes
    the log.

    Args:
        folder: created by `open`.
        series: beginning of the files' names; no other log in the folder has the same.
        lock_name: the file that is locked.
        is_whole: whether a line (bytes, with or without its line feed) is complete.
        max_bytes: a file that has reached this size is closed and the next one begun.
        fsync: False leaves it to the operating system when lines reach the disk.
    """

    def __init__(
        self,
        folder: Path,
        series: str,
        lock_name: str,
        is_whole: Callable[[bytes], bool],
        *,
        max_bytes: int = 64 << 20,
        fsync: bool = True,
    ) -> None:
        self.folder, self.series, self.lock_name = folder, series, lock_name
        self.is_whole, self.max_bytes, self.fsync = is_whole, max_bytes, fsync
        self._lock: int | None = None
        self._file: int | None = None
        self._unflushed = False  # were lines appended without a flush?
        self._path = self._numbered(0)

    def _numbered(self, number: int) -> Path:
        return self.folder / f"{self.series}{number:05d}.jsonl"

    def open(self) -> None:
        """Lock the log and repair its last line; nothing if it is open."""
        if self._lock is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / self.lock_name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise LogLocked(f"{self.folder / self.lock_name}: locked by another writer") from None
        self._lock = lock
        try:
            paths = sorted(self.folder.glob(f"{self.series}*.jsonl"))
            if mine := [path for path in paths if series_of(path) == self.series]:
                self._path = mine[-1]
                repair_last_line(self._path, self.is_whole)
        except BaseException:
            self.close()
            raise

    def append(self, lines: bytes, *, flush: bool = True) -> tuple[Path, int]:
        """Write whole lines at the end, all or none of them; they are on disk when it returns, or
        (not `flush`) after the next `flush`. Returns the file and where in it they begin."""
        self.open()
        file = self._current()
        size = os.fstat(file).st_size
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(file, rest) :]
            if flush and self.fsync:
                os.fsync(file)
        except BaseException:
            try:
                os.ftruncate(file, size)  # half a line must not stand before the next one
            finally:
                self.close()  # the next append reads the folder again
            raise
        self._unflushed = not flush
        return self._path, size

    def flush(self) -> None:
        """Bring to disk what was appended without. If the disk refuses (`OSError`), the lines stay
        for those who read, and the log is closed."""
        if self._unflushed and self.fsync and self._file is not None:
            try:
                os.fsync(self._file)
            except BaseException:
                self.close()
                raise
        self._unflushed = False

    def _current(self) -> int:
        """The descriptor of the file that takes the next line."""
        if self._file is not None and os.fstat(self._file).st_size >= self.max_bytes:
            self.flush()
            os.close(self._file)
            self._file = None
        if self._file is None:
            if self._path.exists() and self._path.stat().st_size >= self.max_bytes:
                self._path = self._numbered(int(self._path.stem.rpartition("-")[2]) + 1)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            fsync(self.folder)
        return self._file

    def close(self) -> None:
        """Give the lock back. The log opens again at the next append."""
        for handle in (self._file, self._lock):
            if handle is not None:
                os.close(handle)
        self._file = self._lock = None


def repair_last_line(path: Path, is_whole: Callable[[bytes], bool]) -> None:
    """Cut a torn last line off a file of lines; give a whole one its line feed."""
    with path.open("rb+") as file:
        start = end = 0
        line = b""
        for line in file:
            start, end = end, end + len(line)
        if line and not is_whole(line):
            log.warning(
                "%s: the last line was torn by a crash; cut off, %d bytes", path, end - start
            )
            file.truncate(start)
        elif line and not line.endswith(b"\n"):
            file.seek(end)
            file.write(b"\n")
