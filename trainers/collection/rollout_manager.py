"""The rollout manager: the episodes of a step, played, stored or read from a store.

Rank 0 plays, with the others where it can be shared (`rank_players.py`), and stores. `collect`,
`play`, `ask`, `derive`, `earlier` and `stored` give every rank the same episodes, so every rank has
to call them. The other methods are rank 0's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from ...agents.concurrency import gather
from ...agents.state import TeamState
from ...agents.system import System
from ...agents.types import SettingError, Task
from ...rollouts.episodes.aside_store import StoredAsides
from ...rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from ...rollouts.episodes.runner import EpisodeRunner
from ...rollouts.episodes.store import Store
from ...rollouts.ledger import Ledger
from ...rollouts.rewards.scoring import RewardFn, fn_name
from ...rollouts.types import Episode, Kind
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..monitoring.run_log import RunLog
from ..weight_sync.sync import WeightSync
from .asides import AsideNumbers, Question, answers, aside_requests
from .async_rollouts import AsyncCollector, CollectedStep
from .background import BackgroundLoop, BackgroundTask, StopSignal
from .derived_episodes import Derivation, derive_missing, stored_children
from .engines import EngineGroup
from .identified_episodes import Evaluations, Identified, Play, training_label, weights_below
from .player_service import GREEDY, SAMPLED, serve, share_episodes
from .rank_players import RankPlayers
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
        engines, sync: who answers, and with which state.
        log: counters and progress.
        ledger: meters every call.

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
    players: RankPlayers | None = None
    _label = "train-{step:06d}"

    def __init__(
        self,
        config: RunConfig,
        system: System,
        rewards: Sequence[RewardFn],
        tasks: Sequence[Task],
        *,
        engines: EngineGroup,
        sync: WeightSync,
        log: RunLog,
        ledger: Ledger | None = None,
    ) -> None:
        self.config, self.system, self.rewards, self.tasks = config, system, rewards, tasks
        self.engines, self.sync, self.log = engines, sync, log
        self.ledger = ledger or Ledger()
        self.evaluations = Evaluations(config.folder)
        self._numbers = AsideNumbers()
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
        config, perform = self.config, self.background.run
        self.sync.open(self.engines.of, perform, self.log.step, closing, alone=self._alone)
        self.runner = dataclasses.replace(
            self._plain_runner(),
            state=TeamState(values=self.sync.state.values),
            ledger=self.ledger,
            asides=StoredAsides(self.store, self.keep, again=self.engines.deterministic),
        )
        self.ledger.replay(self.store)
        self._label = training_label(self.runner, weights_below(self.sync.learner), config.folder)
        if config.pin == "call" and self.engines.deterministic:
            raise SettingError(
                "pin: call with an engine that repeats itself to the last bit: there a step's"
                " version follows from its number; set pin to episode, or engine to vllm"
            )
        self.start()
        closing.callback(self.ahead.close)

    def _plain_runner(self) -> EpisodeRunner:
        """What plays the run's system with the engines that are open."""
        own, config = (self.system, self.engines.completers(), self.rewards), self.config
        how = {"limits": config.limits(), "seed": config.seed, "version_policy": config.pin}
        return EpisodeRunner(*own, sampling=config.sampling(), **how)  # type: ignore[arg-type]

    def open_players(self, closing: contextlib.ExitStack) -> None:
        """Let the other ranks play too, if that can be shared. After `open`; on every rank."""
        if self.ranks.size == 1:
            return
        if not self.ranks.main:
            serve(self.ranks, self.engines, self._plain_runner, closing)
            return
        self.players = RankPlayers.opened(
            self.ranks, self.engines, self.runner, self.background, self.log, closing
        )
        closing.callback(self.ahead.close)  # first: what the others still play is called off

    def start(self) -> None:
        """Be ready to play, ahead of the trainer too, with the parts that are open."""
        self._one_at_a_time = asyncio.Lock()
        self.ahead = AsyncCollector(
            self.config,
            self.sync.team,
            self.store,
            self.tasks_of,
            lambda label, known, state, room, oversample: self.begin(
                label, known, self.runner, state, room, oversample, SAMPLED
            ),
            label=self._label,
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

        episodes = share_episodes(self.ranks, play)
        self.log.collected(step, episodes, self.metric, time.perf_counter() - start, row)
        return episodes

    def play(
        self,
        tasks: Sequence[Task],
        state: TeamState | None = None,
        *,
        n: int = 1,
        greedy: bool = False,
        kind: Kind = "trial",
        system: System | None = None,
        rewards: Sequence[RewardFn] | None = None,
        label: str = "",
        draws: str = "",
        failures_count: bool = False,
    ) -> list[Episode]:
        """Scored episodes of these tasks, `n` of each, then their children. What was played before
        with the same state is taken from the store. Arguments: see `Play`."""
        what = Play(tasks, state, n, greedy, kind, system, rewards, label, draws, failures_count)
        return share_episodes(self.ranks, lambda: self.play_or_find(what).episodes)

    def ask(self, system: System, task: Task, *, follows: str = "") -> Episode:
        """An optimizer's own talk: an episode of a system of helpers, of kind `aside`; the answer,
        or its `error`. A resumed run takes what was answered before it was cut off. `follows`: id
        of the episode that it is about."""
        return self.ask_all([(system, task, follows)])[0]

    def ask_all(self, questions: Sequence[Question]) -> list[Episode]:
        """Several talks at once, each as `ask` gives it, in their order."""
        step = self.log.step + 1
        first = self._numbers.take(step, len(questions))

        def work() -> list[Episode]:
            known = find_stored(
                self.store,
                lambda attempt: aside_requests(questions, step, first, attempt),
                failures_count=True,
            )
            for episode in known.stored.values():
                self.ledger.cached(episode)
            todo = [k for k, each in enumerate(known.plan) if each.id not in known.stored]
            player = dataclasses.replace(self.player(self.sync.state), rewards=())
            runners = [dataclasses.replace(player, system=questions[k][0]) for k in todo]
            with self.sync.hold(player.state.versions):
                given = self.run_rollouts(
                    answers([known.plan[k] for k in todo], runners, self.keep)
                )
            by_id = {**known.stored, **{episode.id: episode for episode in given}}
            return [by_id[each.id] for each in known.plan]

        return share_episodes(self.ranks, work)

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
            for child in itertools.chain.from_iterable(children.values()):
                self.ledger.stored(child)
            missing = [e for e in episodes if e.id not in children]
            # alone, the missing ones would be decoded in other batches
            todo = list(episodes) if missing and self.engines.deterministic else missing
            with self.sync.hold(self.sync.current):
                self.run_rollouts(
                    derive_missing(todo, make, children, self.keep, self.config.max_concurrency)
                )
            return [child for e in episodes for child in children.get(e.id, ())]

        derived = share_episodes(self.ranks, play)
        self.log.spend("rollout", time.perf_counter() - start)
        self.log.sampled(derived)
        return derived

    def earlier(self, step: int) -> list[Episode]:
        """The training episodes of steps before this one."""
        return share_episodes(self.ranks, lambda: training(self.store, before=step))

    def stored(self, label: str) -> list[Episode]:
        """The episodes that were played under this label (see `play`), also before a resume."""
        return share_episodes(self.ranks, lambda: self.evaluations.episodes(label, self.store))

    # on rank 0

    def player(self, state: TeamState | None = None) -> EpisodeRunner:
        """A runner that plays with this state (None: the one in force) whatever the caller asks
        for: replays speak as the episode did."""
        return dataclasses.replace(self.runner, state=state or self.sync.named(self.sync.state))

    def play_or_find(self, what: Play) -> CollectedStep:
        """As `play`, with how long it took."""
        chosen = self.sync.state if what.state is None else what.state
        runner = dataclasses.replace(
            self.runner,
            system=what.system or self.runner.system,
            rewards=self.runner.rewards if what.rewards is None else what.rewards,
        )
        chosen = chosen.of(runner.policies_of(chosen))
        weights, training = weights_below(self.sync.learner), what.kind == "train"
        step = self.log.step + training  # trials and evaluations are of what is finished
        asked = Identified(runner, chosen, what, step, weights)
        failed = what.failures_count or what.kind == "trial"
        known = find_stored(self.store, asked.requests, failures_count=failed)
        if not what.label or self.evaluations.add(what.label, asked):
            for episode in known.stored.values():
                self.ledger.cached(episode)
        how = GREEDY if what.greedy else SAMPLED
        shared = how if what.system is None and what.rewards is None else ""
        with self.sync.hold(chosen.versions):
            work = self.begin(what.label or what.kind, known, asked.player, chosen, how=shared)
            return work.result(self.stop)

    def begin(
        self,
        label: str,
        known: PlannedEpisodes,
        runner: EpisodeRunner,
        state: TeamState | Callable[[], TeamState],
        room: asyncio.Semaphore | None = None,
        oversample: int = 0,
        how: str = "",
    ) -> BackgroundTask[CollectedStep]:
        """Let these episodes be played beside the caller, as `EpisodeRunner.collect` plays, and
        stored; known ones are taken as they are.

        `oversample`: so many of each task are more than is needed, and the slowest are dropped.
        `how` the runner differs from the run's: see `RankPlayers.play`; "": rank 0 plays all."""
        spread = functools.partial(self.players.play, how) if self.players and how else None
        plan, episodes = known.plan, dict(known.stored)
        for episode in episodes.values():
            self.ledger.stored(episode)
        todo = [request for request in plan if request.id not in episodes]
        if todo and self.engines.deterministic and not oversample:
            todo = plan  # as in `derive`
        needed = known.needed(oversample)
        dropped: list[CancelledEpisode] = []

        async def play() -> CollectedStep:
            async with self.exclusive():
                start = time.perf_counter()
                playing = (
                    first_finished(runner, todo, state, needed, dropped, room)
                    if oversample
                    else runner.collect(todo, state, room, spread)
                )
                total, done = len(plan) - oversample * len(needed), len(plan) - len(todo)
                with self.log.progress.episodes(label, total, done, self.metric) as tick:
                    try:
                        async for episode in playing:
                            if episode.id not in episodes:
                                self.keep([episode], flush=False)
                                episodes[episode.id] = episode
                            tick(episode)
                    finally:
                        self.store.flush()  # once, before anything is learnt from them
            order = {request.id: number for number, request in enumerate(plan)}
            in_order = sorted(episodes.values(), key=lambda e: (order.get(e.id, len(order)), e.id))
            parents = [e for e in in_order if e.parent is None]
            extra = drop_statistics(parents, dropped) if oversample else {}
            return CollectedStep(in_order, time.perf_counter() - start, oversampled=extra)

        return self.background.start(play())

    def run_rollouts(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of other rollouts: replays, drafts, corrections. Ends with `Stopped` when the
        user or the cluster asks."""

        return self._alone(work, self.stop)

    def _alone(self, work: Coroutine[Any, Any, T], stop: StopSignal | None = None) -> T:
        async def perform() -> T:
            async with self.exclusive():
                return await work

        return self.background.run(perform(), stop)

    def exclusive(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """With deterministic engines one set of rollouts plays after the other, and weights are
        verified between them: which requests are decoded together must not depend on chance."""
        return self._one_at_a_time if self.engines.deterministic else contextlib.nullcontext()

    def keep(self, episodes: Sequence[Episode], *, flush: bool = True) -> None:
        """Store these episodes: all or none of them (`flush`: see `Store.extend`)."""
        try:
            lines = self.players.lines_of(episodes) if self.players else {}
            self.store.extend(episodes, flush=flush, lines=lines)
            for episode in episodes:
                self.ledger.stored(episode)
        except OSError as error:
            named = ", ".join(e.id for e in episodes[:3])
            raise RunError(
                f"episode {named} could not be stored in {self.store.folder}: {error}; earlier ones"
                " are whole"
            ) from error
