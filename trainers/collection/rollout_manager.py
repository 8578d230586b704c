"""The rollout manager: the episodes of a step, played, stored or read from a store.

Rank 0 plays and stores; `collect`, `play`, `derive`, `earlier` and `stored` give every rank the
same episodes (`Ranks.share`), so every rank has to call them. The other methods are rank 0's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from ...agents.concurrency import gather
from ...agents.system import System
from ...agents.types import SettingError, Task
from ...rollouts.engines.base import TeamVersion
from ...rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from ...rollouts.episodes.runner import EpisodeRunner
from ...rollouts.episodes.store import Store
from ...rollouts.rewards.scoring import RewardFn, fn_name
from ...rollouts.types import Episode
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..monitoring.run_log import RunLog
from ..weight_sync.sync import WeightSync
from .async_rollouts import AsyncCollector, CollectedStep
from .background import BackgroundLoop, BackgroundTask, StopSignal
from .derived_episodes import Derivation, derive_missing, stored_children
from .engines import EngineGroup
from .stored_episodes import OfflineEpisodes, PlannedEpisodes, find_stored, training
from .task_order import tasks_of

T = TypeVar("T")


class RolloutManager:
    """Plays, stores and finds a run's episodes.

    Args:
        config: rollout settings, seed and folder of the run.
        system: the team that plays.
        rewards: score every episode; the first one's name is the metric.
        tasks: those to train on.
        values: what a team sees of the run's state, by name.
        engines, sync: who answers, and with which versions.
        log: counters and progress.

    `store`, `runner`, `background` and `ahead` exist on rank 0, once `open` has been called there;
    `ranks` and `stop` on every rank after `join`.
    """

    ranks: Ranks
    stop: StopSignal | None
    background: BackgroundLoop
    store: Store
    runner: EpisodeRunner
    ahead: AsyncCollector
    offline: OfflineEpisodes | None = None

    def __init__(
        self,
        config: RunConfig,
        system: System,
        rewards: Sequence[RewardFn],
        tasks: Sequence[Task],
        values: Mapping[str, Any],
        *,
        engines: EngineGroup,
        sync: WeightSync,
        log: RunLog,
    ) -> None:
        self.config, self.system, self.rewards, self.tasks = config, system, rewards, tasks
        self.values, self.engines, self.sync, self.log = values, engines, sync, log
        self.metric = fn_name(rewards[0]) if rewards else ""

    def join(self, ranks: Ranks, stop: StopSignal | None) -> None:
        """Share episodes over these ranks from now on; `stop` ends what is being played."""
        self.ranks, self.stop = ranks, stop

    def open(self, closing: contextlib.ExitStack, offline: OfflineEpisodes | None = None) -> None:
        """Open the store, start the engines, publish what is there (rank 0). `closing` will end
        what was started, in the right order. `offline`: episodes to learn from instead of playing.
        """
        self.offline = offline
        if self.engines.given is None:
            self.background = BackgroundLoop()
            closing.callback(self.background.close)
        elif not hasattr(self, "background"):
            # the loop that a given engine works in outlives `close`, as the engine does
            self.background = BackgroundLoop()
        self.store = Store(self.config.folder / "episodes")
        closing.callback(self.store.close)
        self.engines.open(self.background, self.log.say, closing)
        self.sync.open(self.engines.of, self.background.run, self.log.step, closing)
        config = self.config
        self.runner = EpisodeRunner(
            self.system,
            self.engines.completers(),
            self.rewards,
            self.values,
            config.sampling(),
            config.limits(),
            config.seed,
            version_policy=config.pin,
        )
        if config.pin == "call" and self.engines.deterministic:
            raise SettingError(
                "pin: call with an engine that repeats itself to the last bit: there a step's"
                " version follows from its number; set pin to episode, or engine to vllm"
            )
        self.start()
        closing.callback(self.ahead.close)

    def start(self) -> None:
        """Be ready to play, ahead of the trainer too, with the parts that are open."""
        self._one_at_a_time = asyncio.Lock()
        self.ahead = AsyncCollector(
            self.config,
            self.sync.team,
            self.store,
            self.tasks_of,
            lambda label, known, versions, room, oversample: self.begin(
                label, known, self.runner, versions, room, oversample
            ),
            deterministic=self.engines.deterministic,
            warn=self.log.warn,
            stop=self.stop,
        )

    # on every rank

    def tasks_of(self, step: int) -> list[Task]:
        """The tasks of a step, see `task_order.tasks_of`."""
        return tasks_of(self.tasks, self.config.tasks_per_step, self.config.seed, step)

    def collect(
        self, step: int, after: Callable[[Episode], Awaitable[Episode]] | None = None
    ) -> list[Episode]:
        """The step's episodes, in the order of tasks and samples.

        With `max_staleness` the rollouts of later steps are begun too and go on while this one is
        learnt (`async_rollouts.py`). With `config.episodes` they come from that store: the groups
        of `tasks_per_step` of its tasks, in the order `tasks_of` gives. `after` may add to a scored
        episode before the others see it (replays, judges of whole groups). Episodes of this step
        that are stored already, played by adapter versions that fit, are taken as they are.
        """
        start, row = time.perf_counter(), dict[str, Any]()

        def play() -> list[Episode]:
            if self.offline is not None:
                config = self.config
                episodes = self.offline.of(config.tasks_per_step, config.seed, step)
            else:
                collected = self.ahead.take(step)
                episodes = collected.episodes
                row.update(collected.row(self.config.max_staleness))
            self.sync.verify(step - 1, episodes, start=True)
            if after is not None:
                episodes = self.run_rollouts(gather([after(episode) for episode in episodes]))
            return episodes

        episodes = self.ranks.share(play, Episode)
        self.log.collected(step, episodes, self.metric, time.perf_counter() - start, row)
        return episodes

    def play(
        self,
        label: str,
        tasks: Sequence[Task],
        num_generations: int = 1,
        versions: Mapping[str, str] | None = None,
    ) -> list[Episode]:
        """Sampled episodes of held-out tasks, scored and stored as `eval-LABEL`. `versions` None:
        those in force."""
        return self.ranks.share(
            lambda: (
                self.play_or_find(
                    tasks, f"eval-{label}", self.log.step, self.runner, num_generations, versions
                ).episodes
            ),
            Episode,
        )

    def derive(
        self, step: int, episodes: Sequence[Episode], kind: str, make: Derivation
    ) -> list[Episode]:
        """What follows from each episode, in their order, stored as their children.

        Args:
            kind: a word that names the children.
            make: plays what follows from one episode (on rank 0), in groups named
                `PARENT/KIND/...`. At most `max_concurrency` at once.
        """
        start = time.perf_counter()

        def play() -> list[Episode]:
            children = stored_children(self.store, episodes, kind)
            # Played alone, the missing ones would be decoded in other batches: right, but not to
            # the last bit.
            missing = [e for e in episodes if e.id not in children]
            todo = list(episodes) if missing and self.engines.deterministic else missing
            with self.sync.hold(self.sync.current):
                self.run_rollouts(
                    derive_missing(todo, make, children, self.keep, self.config.max_concurrency)
                )
            return [child for e in episodes for child in children.get(e.id, ())]

        derived = self.ranks.share(play, Episode)
        self.log.spend("rollout", time.perf_counter() - start)
        self.log.sampled(derived)
        return derived

    def earlier(self, step: int) -> list[Episode]:
        """The training episodes of steps before this one."""
        return self.ranks.share(lambda: [e for e in training(self.store) if e.step < step], Episode)

    def stored(self, label: str) -> list[Episode]:
        """The episodes that were played as `eval-LABEL`, also before a resume."""
        return self.ranks.share(
            lambda: [e for e in self.store if e.group.startswith(f"eval-{label}/")], Episode
        )

    # on rank 0

    def player(self, versions: Mapping[str, str] | None = None) -> EpisodeRunner:
        """A runner that plays with these versions (None: those in force) whatever the caller asks
        for: replays speak as the episode did."""
        pinned = dict(self.sync.current if versions is None else versions)
        return dataclasses.replace(self.runner, pinned=pinned)

    def play_or_find(
        self,
        tasks: Sequence[Task],
        label: str,
        step: int,
        runner: EpisodeRunner,
        num_generations: int = 1,
        versions: Mapping[str, str] | None = None,
        oversample: int = 0,
    ) -> CollectedStep:
        """The episodes of these tasks, from the store where it has them, else played and stored.
        `versions` None: those in force. `oversample`: see `begin`."""
        chosen = self.sync.current if versions is None else versions
        now, count = self.sync.named(chosen), num_generations + oversample
        known = find_stored(
            self.store, tasks, label, count, step, lambda episode: episode.team_version == now
        )
        with self.sync.hold(chosen):
            work = self.begin(label, known, runner, chosen, oversample=oversample)
            return work.result(self.stop)

    def begin(
        self,
        label: str,
        known: PlannedEpisodes,
        runner: EpisodeRunner,
        versions: TeamVersion | Callable[[], TeamVersion],
        room: asyncio.Semaphore | None = None,
        oversample: int = 0,
    ) -> BackgroundTask[CollectedStep]:
        """Let these episodes be played beside the caller, as `EpisodeRunner.collect` plays, and
        stored; known ones are taken as they are.

        `oversample`: so many of each task are more than is needed, and the slowest are dropped.
        """
        plan, episodes = known.plan, dict(known.stored)
        todo = [request for request in plan if request.id not in episodes]
        if todo and self.engines.deterministic and not oversample:
            # Played alone, the missing ones would be decoded in other batches: right, but not to
            # the last bit.
            todo = plan
        needed = _needed(known, oversample)
        dropped: list[CancelledEpisode] = []

        async def play() -> CollectedStep:
            async with self.exclusive():
                start = time.perf_counter()
                playing = (
                    first_finished(runner, todo, versions, needed, dropped, room)
                    if oversample
                    else runner.collect(todo, versions, room)
                )
                total, done = len(plan) - oversample * len(needed), len(plan) - len(todo)
                with self.log.progress.episodes(label, total, done, self.metric) as tick:
                    async for episode in playing:
                        if episode.id not in episodes:
                            self.keep([episode])
                            episodes[episode.id] = episode
                        tick(episode)
            order = {request.id: number for number, request in enumerate(plan)}
            in_order = sorted(episodes.values(), key=lambda e: (order.get(e.id, len(order)), e.id))
            parents = [e for e in in_order if e.parent is None]
            extra = drop_statistics(parents, dropped) if oversample else {}
            return CollectedStep(in_order, time.perf_counter() - start, oversampled=extra)

        return self.background.start(play())

    def run_rollouts(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of other rollouts: replays, drafts, corrections. Ends with `Stopped` when the
        user or the cluster asks."""

        async def play() -> T:
            async with self.exclusive():
                return await work

        return self.background.run(play(), self.stop)

    def exclusive(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """With deterministic engines one set of rollouts plays after the other: which requests are
        decoded together must not depend on chance."""
        return self._one_at_a_time if self.engines.deterministic else contextlib.nullcontext()

    def keep(self, episodes: Sequence[Episode]) -> None:
        """Store these episodes: all or none of them."""
        try:
            self.store.extend(episodes)
        except OSError as error:
            named = ", ".join(e.id for e in episodes[:3])
            raise RunError(
                f"episode {named} could not be stored in {self.store.folder}: {error}; earlier ones"
                " are whole"
            ) from error


def _needed(known: PlannedEpisodes, oversample: int) -> dict[str, int]:
    """By group, how many of its episodes have still to end well."""
    ended = Counter(
        episode.group
        for episode in known.stored.values()
        if episode.parent is None and episode.error is None
    )
    return {
        group: count - oversample - ended[group]
        for group, count in Counter(request.group for request in known.plan).items()
    }
