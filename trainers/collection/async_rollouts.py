"""Rollouts ahead of the trainer, bounded by staleness: an episode may be at most S team versions
behind when it is learnt from.

Collecting the episodes of step t begins the rollouts of steps t to t + S and waits for those of t.
So the rollouts of later steps are played while step t is learnt, nothing is ever begun that would
be too old when its turn comes, and with S = 0 nothing is played ahead: the synchronous run. An
episode keeps the team version it began with (`pin: call`: each call takes the one in force, so that
turns are younger than their episode, never older). Where engines repeat themselves to the last bit
a step's rollouts are played alone and by the version that the step's number names, so that such a
run repeats itself too; elsewhere an episode begins as soon as there is room, with the version then
in force. The bound is that of one-step-off and fully asynchronous RL (AReaL, arXiv:2505.24298, eq.
3) per episode instead of in sum: rollouts are paced, nothing is thrown away. What is thrown away
after all (stored episodes of versions that a resumed run cannot place) is played again and counted
by agent and length.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...agents.state import TeamState
from ...agents.types import Task
from ...rollouts.episodes.store import Store
from ...rollouts.types import Episode
from ..config import RunConfig
from ..weight_sync.team_states import TeamStates, spoken
from .background import BackgroundTask, StopSignal
from .stored_episodes import PlannedEpisodes, find_stored, training_requests


@dataclass(frozen=True)
class CollectedStep:
    """A step's episodes. `seconds`: between the first one's begin and the last one's end. `ages`:
    in versions, one per episode. `dropped`: stored episodes that could not be placed and were
    played anew. `oversampled`: see
    `oversampling.drop_statistics`.
    """

    episodes: list[Episode]
    seconds: float
    ages: list[int] = field(default_factory=list)
    dropped: list[Episode] = field(default_factory=list)
    oversampled: dict[str, float | int] = field(default_factory=dict)

    def row(self, bound: int) -> dict[str, Any]:
        """What a step's row in `metrics.jsonl` says of it."""
        row: dict[str, Any] = {}
        if bound:  # the trainer's wait says nothing of how fast these were played
            sampled = sum(u.sampled_tokens for e in self.episodes for u in e.usage.values())
            row = {
                "tokens_per_s": sampled / max(self.seconds, 1e-9),
                "staleness": sum(self.ages) / max(len(self.ages), 1),
            }
            row |= {"max_staleness": max(self.ages, default=0)}
        if self.oversampled:
            row["oversampled"] = self.oversampled
        if self.dropped:
            row["dropped_stale"] = {
                "episodes": len(self.dropped),
                "tokens": by_length(self.dropped),
            }
        return row


def by_length(episodes: Sequence[Episode]) -> dict[str, dict[str, int]]:
    """{agent: {"<=64": episodes in which it sampled 33 to 64 tokens, ...}}."""
    lengths: dict[str, Counter[int]] = {}
    for episode in episodes:
        for agent in dict.fromkeys(turn.agent for turn in episode.turns):
            sampled = sum(len(turn.token_ids) for turn in episode.turns if turn.agent == agent)
            lengths.setdefault(agent, Counter())[1 << max(sampled - 1, 0).bit_length()] += 1
    return {
        agent: {f"<={size}": counts[size] for size in sorted(counts)}
        for agent, counts in sorted(lengths.items())
    }


Begin = Callable[
    [str, PlannedEpisodes, TeamState | Callable[[], TeamState], asyncio.Semaphore, int],
    BackgroundTask[CollectedStep],
]


class AsyncCollector:
    """The training rollouts of one run, begun ahead of their step (on rank 0).

    Args:
        config: `num_generations`, `oversample`, `max_steps`, `max_concurrency`.
        team: the team's states of the last S + 1 steps.
        store: where finished episodes are.
        tasks_of: the tasks of a step.
        begin: (label, planned episodes, state, semaphore, oversample) -> the rollouts at work.
        label: how the episodes of a `step` are named.
        deterministic: do the engines repeat themselves to the last bit?
        warn: is given a line about stored episodes that were played anew.
        stop: ends the wait for a step.
    """

    def __init__(
        self,
        config: RunConfig,
        team: TeamStates,
        store: Store,
        tasks_of: Callable[[int], Sequence[Task]],
        begin: Begin,
        *,
        label: str = "train-{step:06d}",
        deterministic: bool,
        warn: Callable[[str], None],
        stop: StopSignal | None,
    ) -> None:
        self.config, self.team, self.store, self.tasks_of = config, team, store, tasks_of
        self.begin, self.deterministic, self.warn, self.stop = begin, deterministic, warn, stop
        self.label = label
        self._begun: dict[int, tuple[BackgroundTask[CollectedStep], list[Episode]]] = {}
        self._room = asyncio.Semaphore(config.max_concurrency)

    def take(self, step: int) -> CollectedStep:
        """The episodes of a step, none of them too old. Begins those of the next S steps.

        Steps of which a run that was cut off has stored episodes are not begun ahead: only in their
        turn is it known how old these are.
        """
        last = min(step + self.team.bound, self.config.max_steps)
        for later in range(step, max(step, last) + 1):
            if later not in self._begun and (later == step or not self._stored(later)):
                self._begun[later] = self._begin(later, later - step)
        work, dropped = self._begun[step]
        collected = work.result(self.stop)
        del self._begun[step]
        if dropped:
            self.warn(
                f"step {step}: {len(dropped)} stored episodes were played with states that are"
                " too old or unknown here; played anew"
            )
        return replace(collected, ages=self.team.ages(collected.episodes), dropped=dropped)

    def _label(self, step: int) -> str:
        return self.label.format(step=step)

    def _stored(self, step: int) -> bool:
        return any(name.startswith(f"{self._label(step)}/") for name in self.store.ids())

    def _begin(self, step: int, ahead: int) -> tuple[BackgroundTask[CollectedStep], list[Episode]]:
        team, config = self.team, self.config
        named = team.named(ahead)

        def fits(episode: Episode) -> bool:
            return (
                episode.state.key == spoken(named, episode).key
                if self.deterministic
                else team.age(episode) is not None
            )

        label, count = self._label(step), config.num_generations + config.oversample
        requests = training_requests(self.tasks_of(step), label, count, step)
        known = find_stored(self.store, requests, fits)
        state = named if self.deterministic else lambda: team.newest
        work = self.begin(label, known, state, self._room, config.oversample)
        return work, known.dropped

    def close(self) -> None:
        """Cancel what was begun and not taken; finished episodes are in the store."""
        for work, _ in self._begun.values():
            work.cancel()
        self._begun = {}
