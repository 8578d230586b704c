"""Tasks and a reward of runs whose team says a digit: the larger it is, the better."""

from __future__ import annotations

from typing import Any

from marlora.agents.types import Task
from marlora.rollouts.types import Episode


def digits(split: str, seed: int = 0, **_: Any) -> list[Task]:
    """Eight tasks to train on, three held-out ones."""
    count, name = (8, "question") if split == "train" else (3, "exam")
    return [Task(f"{name[0]}{n}", f"{name} {n}", "x", split=split) for n in range(count)]


def worth(task: Task, episode: Episode) -> float:
    return int(episode.output or 0) / 3
