"""Checks before a run starts: importable systems, tasks of separate splits, a folder of its own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...agents.state import content_key
from ...agents.system import System
from ...agents.types import AgentSpec, PolicySpec, SettingError, Task, to_json
from ...rollouts.evaluation.suite import prompt_hash
from ...rollouts.types import Episode
from .. import checkpoint as ckpt
from ..collection.stored_episodes import OfflineEpisodes
from ..config import RunConfig
from ..update.learner_base import LearnerBase
from . import ownership
from .lock import FolderLock


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


def check_sole_learner(policies: Mapping[str, PolicySpec], policy: str, method: str) -> None:
    """Refuse policies of which other than the designer's, named `policy`, would be trained, for a
    method that trains the designer alone."""
    learning = [name for name, own in policies.items() if own.trainable and own.has_adapter]
    if policy not in learning:
        raise SettingError(
            f"policies.{policy}: the designer's policy has to be trainable, with an adapter"
        )
    if idle := [name for name in learning if name != policy]:
        raise SettingError(
            f"policies.{idle[0]}: {method} trains the designer alone; set trainable: false, or let"
            " its agents speak as policy base"
        )


def check_tasks(
    train: Sequence[Task], val: Sequence[Task], held_out: Sequence[Task], config: RunConfig
) -> None:
    """Raise `SettingError` unless the training and held-out splits have tasks and no two splits
    share one, by id or by what is asked."""
    for name, split in (("training", train), ("held-out", held_out)):
        if not split:
            raise SettingError(f"tasks {config.tasks!r}: the {name} split is empty")
    for name, split, other, others in (
        ("held-out", held_out, "trained on", train),
        ("held-out", held_out, "used for validation", val),
        ("validation", val, "trained on", train),
    ):
        both = shared_tasks(split, others)
        if both:
            raise SettingError(
                f"tasks {config.tasks!r}: {len(both)} {name} tasks are also {other}, by id or by"
                f" the same prompt, such as {both[0]!r}"
            )


def shared_tasks(split: Sequence[Task], others: Sequence[Task]) -> list[str]:
    """Ids of a split's tasks that are among the others: of the same id, or asking the same of the
    same facts (a game's prompt is one and the same, its `meta` is not)."""
    ids = {task.id for task in others}
    asked = {_asked(task) for task in others}
    return sorted(task.id for task in split if task.id in ids or _asked(task) in asked)


def _asked(task: Task) -> tuple[str, str]:
    return prompt_hash(task.prompt), content_key(to_json(task.public().meta), task.id)


def offline_episodes(
    config: RunConfig,
    agents: Sequence[AgentSpec],
    eval_tasks: Sequence[Task],
    bases: Mapping[str, LearnerBase],
    metric: str = "",
) -> OfflineEpisodes | None:
    """The episodes of another run to learn from (`episodes`), checked against this run's held-out
    tasks, tokenizers and embeddings; None if this run plays. `metric`: the reward that `thumbs`
    stand for."""
    if not config.episodes:
        return None
    offline = OfflineEpisodes(config.episodes, agents)
    if config.thumbs:
        offline.judge_by_thumbs(metric)
    check_tasks([e.task for e in offline.episodes], [], eval_tasks, config)
    tokens = {policy: base.tokens for base in bases.values() for policy in base.policies}
    check_ids(config.episodes, offline.episodes, agents, bases)
    offline.check_tokens({a.name: tokens[a.policy] for a in agents if a.policy in tokens})
    return offline


def check_ids(
    folder: str,
    episodes: Sequence[Episode],
    agents: Sequence[AgentSpec],
    bases: Mapping[str, LearnerBase],
) -> None:
    """Raise `SettingError` for a stored turn, or its prompt, with a token that the model which
    learns from it has no embedding of."""
    rows = {
        policy: (base.path, base.adapters.num_embeddings)
        for base in bases.values()
        for policy in base.adapters.trainable
    }
    learning = {a.name: rows[a.policy] for a in agents if a.policy in rows}
    for episode in episodes:
        for turn in episode.turns:
            model, count = learning.get(turn.agent, ("", sys.maxsize))
            ids = (*turn.prompt_ids, *turn.token_ids)
            wrong = [i for i in (max(ids, default=0), min(ids, default=0)) if not 0 <= i < count]
            if wrong:
                raise SettingError(
                    f"episodes {folder!r}: turn {turn.index} of {turn.agent!r} in episode"
                    f" {episode.id!r} holds the token id {wrong[0]}, and the embedding of {model}"
                    f" has {count} rows (ids 0 to {count - 1}); expected episodes that were sampled"
                    " with the tokenizer of the model that learns from them"
                )


def claim_folder(
    config: RunConfig, say: Callable[[str], None], *, again: bool = False
) -> FolderLock:
    """Own the run folder before anything in it is touched. Raises `SettingError` if it cannot be a
    run's own, another run is at work there, an earlier one's is there and neither `resume` nor
    `overwrite` is set, or `overwrite` would delete what no run wrote. `again`: it is
    this run's already, which is opened a second time."""
    folder = config.folder
    if not config.output_dir:
        raise SettingError("output_dir: expected a folder, got an empty text")
    ownership.check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder.resolve(), say)
    lock.take()
    try:
        if again:
            pass
        elif config.overwrite:
            ownership.check_overwritable(folder, _served_from(config))
        else:
            ownership.check_free(folder, resume=config.resume)
    except BaseException:
        lock.release()
        raise
    return lock


def prepare_folder(config: RunConfig) -> None:
    """Make the claimed run folder ready: delete an earlier run if it is to be overwritten, and what
    a killed one left half written."""
    folder = config.folder
    cut_off = ownership.marked(folder) and ownership.state_of(folder) == ownership.CLEARING
    if config.overwrite or cut_off:
        ownership.clear(folder, _served_from(config))
    ownership.mark(folder)
    ckpt.sweep(folder)
    ownership.remove_staged(folder)


def _served_from(config: RunConfig) -> Path | None:
    """The folder in which servers that run already write where they are, if it lies in the run's:
    it is theirs."""
    if not config.endpoints:
        return None
    return config.folder / os.path.relpath(
        os.path.realpath(config.endpoints), os.path.realpath(config.folder)
    )
