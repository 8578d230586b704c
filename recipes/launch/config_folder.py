"""Relative paths in a config of one's own: what lies beside the config is meant first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlora.rollouts.tasks.registry import SOURCES
from marlora.trainers.model.local_models import SHORT

# settings that name a file or folder that is read; `*` is any name
PATHS = (
    "tasks",
    "task_args.path",
    "model",
    "init",
    "episodes",
    "server_key",
    "policies.*.init",
    "policies.*.base",
    "helpers.*.base",
)
NO_PATHS = {"", "fresh", *SHORT, *SOURCES}


def beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a config in `folder`, where a relative path that exists beside the config is
    the absolute one. Every other path is left to the current folder."""
    found = dict(settings)
    for path in PATHS:
        found = _with_path(found, path.split("."), folder)
    return found


def _with_path(value: Any, names: Sequence[str], folder: Path) -> Any:
    """A value with the text at the end of these names replaced by `_absolute` of it."""
    if not names:
        return _absolute(value, folder) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value
    head, *rest = names
    return {
        key: _with_path(item, rest, folder) if head in ("*", key) else item
        for key, item in value.items()
    }


def _absolute(text: str, folder: Path) -> str:
    """A path that exists in the folder as an absolute one; every other text as it is. A policy's
    name may follow (`CHECKPOINT#POLICY`)."""
    path, mark, policy = text.partition("#")
    if path in NO_PATHS or "\n" in path:
        return text
    try:
        there = (folder / Path(path).expanduser()).absolute()
        return f"{there}{mark}{policy}" if there.exists() else text
    except (OSError, ValueError, RuntimeError):  # no file can be called that
        return text
