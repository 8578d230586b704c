"""Durable files: hashes, fsync, atomic replacement, appending."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

_DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_sha256(path: Path) -> str:
    """Hash of an adapter file's tensors (names, dtypes, shapes, bytes): what the trainer calls the
    adapter's sha256."""
    from safetensors import deserialize

    digest = hashlib.sha256()
    for name, entry in sorted(deserialize(path.read_bytes())):
        digest.update(f"{name} {_DTYPES[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
        digest.update(entry["data"])
    return digest.hexdigest()


def files_sha256(model: str) -> str | None:
    """A hash of a local model's tensor files by name and content; None for a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Make a file's or a folder's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old content or the new, never half, and so does a
    reader after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_text(text)
        fsync(staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Append lines to a log: all or none of them. Raises `OSError` that names the file."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, size)  # half a line must not stand before the next one
        raise OSError(
            error.errno, f"{error.strerror}; earlier lines are whole", str(path)
        ) from error
