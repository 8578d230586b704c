"""Hashes of a model's files: read once, and again when one was written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from marlora.rollouts.files import files_sha256


def expected(*files: tuple[str, bytes]) -> str:
    return hashlib.sha256(b"".join(name.encode() + content for name, content in files)).hexdigest()


def test_files_are_hashed_by_name_and_content_and_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"one")
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "other.json").write_bytes(b"{}")
    real, opened = Path.open, list[str]()

    def noted(path: Path, mode: str = "r") -> object:
        if mode == "rb":
            opened.append(path.name)
        return real(path, mode)

    monkeypatch.setattr(Path, "open", noted)
    both = ("a.safetensors", b"one"), ("b.safetensors", b"two")
    assert files_sha256(str(tmp_path)) == files_sha256(str(tmp_path)) == expected(*both)
    assert opened == ["a.safetensors", "b.safetensors"]
    before = (tmp_path / "a.safetensors").stat()
    (tmp_path / "a.safetensors").write_bytes(b"ONE")  # of the same size
    os.utime(tmp_path / "a.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert files_sha256(str(tmp_path)) == expected(("a.safetensors", b"ONE"), both[1])


def test_a_name_of_the_hub_has_no_files() -> None:
    assert files_sha256("nobody/no-such-model") is None
