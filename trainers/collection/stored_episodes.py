"""Episodes that are stored already: those of a step that a resumed run played before it was cut
off, and those of another run."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...agents.types import AgentSpec, Reward, SettingError, Task, to_json
from ...rollouts.episodes.runner import EpisodeRequest, episode_requests
from ...rollouts.episodes.store import Store
from ...rollouts.episodes.thumbs import FILE, UP, read_thumbs
from ...rollouts.renderer import ChatRenderer
from ...rollouts.types import Episode, groups
from ..monitoring.step_metrics import unscorable
from .task_order import tasks_of


@dataclass(frozen=True)
class PlannedEpisodes:
    """Episodes to play (`plan`), and those of them that are `stored` already, with their children,
    by id. `dropped`: stored, but by a team version that does not fit."""

    plan: list[EpisodeRequest]
    stored: dict[str, Episode]
    dropped: list[Episode]

    def needed(self, oversample: int) -> dict[str, int]:
        """By group, how many of its episodes have still to end well, where `oversample` more are
        planned than are needed."""
        ended = Counter(
            episode.group
            for episode in self.stored.values()
            if episode.parent is None and episode.error is None
        )
        return {
            group: count - oversample - ended[group]
            for group, count in Counter(request.group for request in self.plan).items()
        }


def find_stored(
    store: Store,
    requests: Callable[[int], list[EpisodeRequest]],
    fits: Callable[[Episode], bool] = lambda episode: True,
    *,
    failures_count: bool = False,
) -> PlannedEpisodes:
    """What to play of these requests (a function of the number of the attempt).

    Stored episodes count if they were played on the same tasks, word for word, with a state that
    `fits`, and some could be scored
    (`failures_count`: whatever came of them, as for a candidate that cannot work). Others have
    spent their ids (a run that was resumed on hardware that does not repeat itself to the last bit,
    or after its rewards were repaired): then the next attempt's are played, so that what is trained
    on is always in the store.
    """
    known, dropped = store.ids(), list[Episode]()
    for attempt in itertools.count():
        plan = requests(attempt)
        spent = known & {job.id for job in plan}
        if not spent:
            return PlannedEpisodes(plan, {}, dropped)
        episodes = {episode.id: episode for episode in store.read(id=spent)}
        asked = {job.id: to_json(job.task) for job in plan}
        fitting = all(fits(e) and to_json(e.task) == asked[e.id] for e in episodes.values())
        if fitting and (failures_count or not all(map(unscorable, episodes.values()))):
            return PlannedEpisodes(plan, episodes | _children(store, spent), dropped)
        dropped += [] if fitting else episodes.values()
    raise AssertionError("count() does not end")


def training_requests(
    tasks: Sequence[Task], label: str, num_generations: int, step: int
) -> Callable[[int], list[EpisodeRequest]]:
    """The requests of a step's episodes; those of a later attempt have its number in their
    label."""
    return lambda attempt: episode_requests(
        tasks,
        label=f"{label}.{attempt}" if attempt else label,
        num_generations=num_generations,
        step=step,
    )


def _children(store: Store, parents: Collection[str]) -> dict[str, Episode]:
    """All that the episodes of these ids played as children, and these in turn. They are stored
    before their parents; what was derived from an episode is stored after it, and is no part of
    it."""
    found, later = set[str](), set[str]()
    for data in store.lines():
        if data["parent"] in parents and data["parent"] not in later:
            found.add(data["id"])
        elif data["id"] in parents:
            later.add(data["id"])
    if not found:
        return {}
    return {e.id: e for e in store.read(id=found)} | _children(store, found)


def training(store: Store, before: float = math.inf) -> list[Episode]:
    """The episodes of a store that may be learnt from, of steps `before` this one: not evaluations,
    which stay held out, nor trials of candidates, nor what an optimizer said."""
    return [episode for episode in store.read(kind="train") if episode.step < before]


class OfflineEpisodes:
    """The training episodes of a store that another run or `marlora collect` has filled.

    Args:
        folder: the store, or a run that holds one as `episodes`.
        agents: of the team that learns from them; at least one of them has to have spoken there.

    Raises `SettingError` if there is no store, no training episode in it, or none of these agents.
    """

    def __init__(self, folder: str | Path, agents: Sequence[AgentSpec]) -> None:
        path = Path(folder)
        path = path / "episodes" if (path / "episodes").is_dir() else path
        self.run = path.parent
        if not path.is_dir():
            raise SettingError(
                f"episodes {str(folder)!r}: no such folder; expected a run or a store of episodes"
            )
        self.episodes = training(Store(path))
        if not self.episodes:
            raise SettingError(f"episodes {str(folder)!r}: the store holds no training episode")
        spoke, names = {t.agent for e in self.episodes for t in e.turns}, [a.name for a in agents]
        if not spoke & set(names):
            raise SettingError(
                f"episodes {str(folder)!r}: its agents are {', '.join(sorted(spoke))}, this team's"
                f" are {', '.join(names)}"
            )

    def judge_by_thumbs(self, metric: str) -> None:
        """Keep the episodes that people gave a thumb, which is their only reward from now on: 1 for
        up, 0 for down, under the name `metric`. Raises `SettingError` if there are none."""
        thumbs = read_thumbs(self.run)
        judged = [
            replace(e, rewards=(Reward(metric, float(thumbs[e.id] == UP), source="thumb"),))
            for e in self.episodes
            if e.id in thumbs
        ]
        if not judged:
            raise SettingError(
                f"thumbs: {self.run / FILE} holds none of a training episode; give some with"
                f" `marlora report {self.run} --follow`"
            )
        self.episodes = judged

    def check_tokens(self, tokens_of: Mapping[str, ChatRenderer], count: int = 50) -> None:
        """Raise `SettingError` unless the first turns of every agent read the same in its own
        tokenizer: ids of another one are other words."""
        for agent, tokens in tokens_of.items():
            spoken = (t for e in self.episodes for t in e.turns if t.agent == agent and t.token_ids)
            for turn in itertools.islice(spoken, count):
                if tokens.decode(turn.token_ids) != turn.text:
                    raise SettingError(
                        f"episodes: a turn of {agent!r} says {turn.text[:40]!r}, but its tokens"
                        f" read {tokens.decode(turn.token_ids)[:40]!r} in this run's model;"
                        " expected episodes that were sampled with the tokenizer that learns from"
                        " them"
                    )

    def of(self, count: int, seed: int, step: int) -> list[Episode]:
        """The groups of `count` tasks, chosen as a run that plays chooses its tasks."""
        by_task: dict[str, list[Episode]] = {}
        for group in groups(self.episodes).values():
            by_task.setdefault(group[0].task.id, []).extend(group)
        chosen = tasks_of([group[0].task for group in by_task.values()], count, seed, step)
        return [episode for task in chosen for episode in by_task[task.id]]
