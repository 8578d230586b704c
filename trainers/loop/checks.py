"""Checks before a run starts: importable systems, tasks of separate splits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ...agents.team import System
from ...agents.types import SettingError, Task
from ..config import RunConfig


def check_importable(system: System) -> None:
    """Refuse a System that a checkpoint could not name: evaluation has to import it again."""
    cls = type(system)
    try:
        module = importlib.import_module(cls.__module__) if cls.__module__ != "__main__" else None
    except ImportError:  # it came from a place that is on no path
        module = None
    if (
        module is None
        or "<locals>" in cls.__qualname__
        or getattr(module, cls.__qualname__, None) is not cls
    ):
        raise SettingError(
            f"system {cls.__qualname__} is defined in"
            f" {cls.__module__}{' (inside a function)' if '<locals>' in cls.__qualname__ else ''}:"
            " put the class at the top of a module of its own, so that checkpoints can import it"
        )


def check_tasks(train: Sequence[Task], held_out: Sequence[Task], config: RunConfig) -> None:
    for name, found in (("training", train), ("held-out", held_out)):
        if not found:
            raise SettingError(f"tasks {config.tasks!r}: the {name} split is empty")
    both = {task.id for task in train} & {task.id for task in held_out}
    if both:
        raise SettingError(
            f"tasks {config.tasks!r}: {len(both)} held-out tasks are also trained on, such as"
            f" {sorted(both)[0]!r}"
        )
