"""Checkpoint folders on disk: staged, fsynced, hashed into a manifest and renamed, so that one is
complete or absent; found, verified and pruned. What they hold is in `loop/checkpointing.py`.

A checkpoint is staged under a dot name, every file and folder is fsynced, the manifest with each
file's sha256 is written last, and one rename makes it visible. A kill at any moment leaves either
the whole checkpoint or none. A torn or altered one does not match its manifest; it is reported, and
the newest one that matches is loaded. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..agents.types import SettingError
from ..rollouts.files import file_sha256, fsync, write_text

SCHEMA = 1
MANIFEST = "manifest.json"


class CheckpointError(SettingError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file atomically (see `files.write_text`)."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable)


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whose bytes are a function of the tensors and metadata. A full disk
    raises `OSError`.

    (safetensors' `save_file` writes its metadata in random order and raises its own error.)
    """
    from safetensors.torch import save

    data = save(dict(tensors), {"format": "pt", **(metadata or {})})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > size:
        raise ValueError(
            f"{path}: the header of {len(tensors)} tensors grew when sorted, from {size} bytes to"
            f" {len(text)}"
        )
    with path.open("wb") as file:
        file.write(data[:8] + text.ljust(size))
        file.write(memoryview(data)[8 + size :])


def publish_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Write a folder with a manifest atomically: `write(staged)` fills it, then it is made durable
    and renamed to `target`. On error nothing stays.

    An existing `target` is replaced: give a name that is in use only to repair a folder that does
    not verify.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir()
        write(staged)
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        hashes = {str(path.relative_to(staged)): file_sha256(path) for path in files}
        (staged / MANIFEST).write_text(
            json.dumps({"schema": SCHEMA, "sha256": hashes}, indent=2) + "\n", encoding="utf-8"
        )
        for path in [
            *files,
            staged / MANIFEST,
            *(p for p in staged.rglob("*") if p.is_dir()),
            staged,
        ]:
            fsync(path)
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return target


def verify(folder: Path) -> None:
    """Check a folder against its manifest; raises `CheckpointError` unless every listed file is
    there with its sha256."""
    manifest = folder / MANIFEST
    try:
        hashes = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{manifest}: no readable manifest ({type(error).__name__}); not a complete checkpoint"
        ) from error
    if not isinstance(hashes, dict) or not hashes:
        raise CheckpointError(f"{manifest}: lists no file with its hash; not a complete checkpoint")
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, though the manifest lists it")
        if file_sha256(path) != expected:
            raise CheckpointError(
                f"{path}: its sha256 is not the manifest's; the file was altered or torn"
            )


def list_checkpoints(run: Path) -> list[Path]:
    """Complete-looking checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_valid(
    run: Path, say: Callable[[str], None], fits: Callable[[Path], None] = lambda folder: None
) -> Path | None:
    """The newest checkpoint that matches its manifest and fits this run; each one skipped is
    reported through `say`.

    `fits(folder)` raises `SettingError` where a whole checkpoint is not one of this run's (another
    base, another LoRA rank). If there are only such ones, the newest one's error is raised, since
    `resume` was asked for. None if there is no whole checkpoint.
    """
    misfit: SettingError | None = None
    for folder in reversed(list_checkpoints(run)):
        try:
            verify(folder)
            fits(folder)
            return folder
        except SettingError as error:
            if not isinstance(error, CheckpointError):
                misfit = misfit or error
            say(f"skipping {folder.name}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            unread = SettingError(
                f"{folder}: whole, but not in the form that this version of marlora writes"
                f" ({what}); resume with its own"
            )
            misfit = misfit or unread
            say(f"skipping {folder.name}: {unread}")
    if misfit is not None:
        raise misfit
    return None


def sweep(run: Path) -> None:
    """Delete folders that a kill left half written or half deleted. Only for the one process that
    writes this run."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def prune(run: Path, keep: int, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `keep`; the newest and the best always stay."""
    folders = list_checkpoints(run)
    for folder in folders[: max(len(folders) - keep, 0)]:
        if folder.name != best:
            # Renamed first, so that a kill during deletion leaves no half folder under a
            # checkpoint's name.
            doomed = folder.with_name(f".{folder.name}.deleted")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def split_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """A torch optimizer's `state_dict` as named tensors `INDEX.KEY` (step counts become
    tensors)."""
    import torch

    return {
        f"{index}.{key}": (
            value.detach().clone().contiguous()
            if isinstance(value, torch.Tensor)
            else torch.tensor(float(value))
        )
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }


def join_optimizer(optimizer: Any, tensors: Mapping[str, Any]) -> None:
    """Put `split_optimizer`'s tensors back into a fresh optimizer over the same parameters in the
    same order."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if state and set(state) != set(range(count)):
        raise SettingError(
            f"optimizer state holds {len(state)} tensors' moments, the adapter has {count}; its"
            " targets or rank changed"
        )
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def read_system(folder: Path) -> dict[str, Any]:
    """`system.json` of a checkpoint, or of a run folder (then its newest checkpoint's)."""
    path = folder / "system.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; expected a checkpoint such as RUN/checkpoints/step-000010"
        ) from error
