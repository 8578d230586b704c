"""Accuracy of a team on tasks, with intervals, and paired differences between two evaluations of
the same tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...agents.state import TeamState
from ...agents.types import SettingError, Task, nearest
from ..episodes.runner import EpisodeRunner, episode_requests
from ..types import Episode
from .statistics import Evaluation


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
        if e.parent is None and r.agent is None and r.turn is None and r.decision is None
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
        elif episode.failed:
            failed += 1
            errors.append(next((r.text for r in episode.rewards), "no reward"))
        values[episode.task.id].append(0.0 if math.isnan(value) else value)
    scores = {task: sum(own) / len(own) for task, own in values.items()}
    return Evaluation(scores, failed, tuple(sorted(set(errors))), tokens)


def best(episodes: Iterable[Episode], metric: str) -> list[Episode]:
    """Of every task the episode with the highest reward of this name: best-of-n, picked by the
    metric itself."""
    bests: dict[str, Episode] = {}
    for episode in episodes:
        if episode.parent is None:
            reward = bests.setdefault(episode.task.id, episode).reward(metric)
            if math.isnan(reward) or episode.reward(metric) > reward:
                bests[episode.task.id] = episode
    return list(bests.values())


async def evaluate(
    rollouts: EpisodeRunner,
    tasks: Sequence[Task],
    state: TeamState | None = None,
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
            async for episode in player.collect(
                episode_requests(tasks, label="eval", kind="eval"), state
            )
        ],
        metric,
    )
