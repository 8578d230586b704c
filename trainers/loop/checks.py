"""Checks before a run starts: importable systems, tasks of separate splits, a folder of its own."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence

from ...agents.system import System
from ...agents.types import AgentSpec, SettingError, Task
from .. import checkpoint as ckpt
from ..collection.stored_episodes import OfflineEpisodes
from ..config import RunConfig
from ..update.learner import LearnerBase


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
    """Raise `SettingError` unless both splits have tasks and share none."""
    for name, split in (("training", train), ("held-out", held_out)):
        if not split:
            raise SettingError(f"tasks {config.tasks!r}: the {name} split is empty")
    both = {task.id for task in train} & {task.id for task in held_out}
    if both:
        raise SettingError(
            f"tasks {config.tasks!r}: {len(both)} held-out tasks are also trained on, such as"
            f" {sorted(both)[0]!r}"
        )


def offline_episodes(
    config: RunConfig,
    agents: Sequence[AgentSpec],
    eval_tasks: Sequence[Task],
    bases: Mapping[str, LearnerBase],
) -> OfflineEpisodes | None:
    """The episodes of another run to learn from (`episodes`), checked against this run's held-out
    tasks and tokenizers; None if this run plays."""
    if not config.episodes:
        return None
    offline = OfflineEpisodes(config.episodes, agents)
    check_tasks([e.task for e in offline.episodes], eval_tasks, config)
    tokens = {policy: base.tokens for base in bases.values() for policy in base.policies}
    offline.check_tokens({a.name: tokens[a.policy] for a in agents if a.policy in tokens})
    return offline


def prepare_folder(config: RunConfig) -> None:
    """Make the run folder ready. Raises `SettingError` if another run's is there and neither
    `resume` nor `overwrite` is set."""
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"output_dir {folder}: a file of that name is there; name a folder")
    used = (folder / "config.yaml").exists()
    if used and config.overwrite:
        shutil.rmtree(folder)
    elif used and not config.resume:
        raise SettingError(
            f"output_dir {folder}: holds an earlier run; set resume to go on, overwrite to"
            " replace it, or another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    ckpt.sweep(folder)
