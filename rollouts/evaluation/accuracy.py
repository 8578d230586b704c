"""Accuracy of a team on tasks, with intervals, and paired differences between two evaluations of
the same tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.types import SettingError, Task, nearest
from ..engines.base import TeamVersion
from ..episodes.runner import EpisodeRunner, episode_requests
from ..types import Episode


@dataclass(frozen=True)
class Evaluation:
    """Scores by task id (a failed or unscorable episode counts 0 and is counted in `failed`)."""

    scores: Mapping[str, float]
    failed: int = 0
    errors: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def accuracy(self) -> float:
        return sum(self.scores.values()) / len(self.scores)

    def summary(self) -> dict[str, Any]:
        low, high = interval(list(self.scores.values()))
        return {
            "accuracy": self.accuracy,
            "ci95": [low, high],
            "num_tasks": len(self.scores),
            "failed": self.failed,
        }


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share of `count` trials (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(scores: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's if all scores are 0 or 1, else the normal one, from their
    spread."""
    count, mean = len(scores), sum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(mean, count, z)
    half = z * math.sqrt(sum((s - mean) ** 2 for s in scores) / max(count - 1, 1) / count)
    return mean - half, mean + half


def paired(before: Evaluation, after: Evaluation, z: float = 1.959964) -> dict[str, Any]:
    """Mean difference after - before over the same tasks, with its 95 % interval (normal, from the
    spread of the differences)."""
    if set(before.scores) != set(after.scores):
        raise SettingError(
            "paired: the two evaluations hold different tasks; evaluate both on one task set"
        )
    differences = [after.scores[task] - before.scores[task] for task in before.scores]
    n, mean = len(differences), sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1))
    half = z * spread / math.sqrt(n)
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {"difference": mean, "ci95": [mean - half, mean + half], "gained": gained, "lost": lost}


def evaluation(
    tasks: Sequence[Task], episodes: Iterable[Episode], metric: str | None = None
) -> Evaluation:
    """Score every task by the team's reward named `metric` (None: the sum of all team rewards), in
    the mean over its episodes.

    Child episodes only cost tokens. Raises `SettingError` if there are no tasks, or if rewards were
    given but none of that name.
    """
    if not tasks:
        raise SettingError("evaluate: the task set is empty; expected at least one task")
    episodes = list(episodes)
    given = {
        r.name
        for e in episodes
        for r in e.rewards
        if e.parent is None and r.agent is None and r.turn is None
    }
    if metric is not None and given and metric not in given:
        raise SettingError(
            f"rewards: the first one, {metric!r}, gives no reward of the team by its own name;"
            f" {nearest(metric, sorted(given))}"
        )
    values: dict[str, list[float]] = {task.id: [] for task in tasks}
    failed, tokens, errors = 0, 0, []
    for episode in episodes:
        tokens += sum(usage.sampled_tokens for usage in episode.usage.values())
        if episode.parent is not None:
            continue
        value = episode.reward(metric)
        if math.isnan(value):
            failed += 1
            errors.append(
                episode.error
                or next((r.text for r in episode.rewards if math.isnan(r.value)), "no reward")
            )
        values[episode.task.id].append(0.0 if math.isnan(value) else value)
    scores = {task: sum(own) / len(own) for task, own in values.items()}
    return Evaluation(scores, failed, tuple(sorted(set(errors))), tokens)


def best(episodes: Iterable[Episode], metric: str) -> list[Episode]:
    """Of every task the episode with the highest reward of this name: best-of-n, picked by the
    metric itself."""
    found: dict[str, Episode] = {}
    for episode in episodes:
        if episode.parent is None:
            held = found.setdefault(episode.task.id, episode)
            if math.isnan(held.reward(metric)) or episode.reward(metric) > held.reward(metric):
                found[episode.task.id] = episode
    return list(found.values())


async def evaluate(
    rollouts: EpisodeRunner,
    tasks: Sequence[Task],
    version: TeamVersion | None = None,
    *,
    metric: str | None = None,
    greedy: bool = True,
) -> Evaluation:
    """Play every task once (at temperature 0 unless `greedy` is False) and score it."""
    player = rollouts.greedy() if greedy else rollouts
    return evaluation(
        tasks,
        [
            episode
            async for episode in player.collect(episode_requests(tasks, label="eval"), version)
        ],
        metric,
    )
