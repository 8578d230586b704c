"""What rank 0 has and the other ranks have not: the loop beside the trainer, the store, the engines
with their publishers, and who plays."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ...agents.types import BASE, PolicySpec, SettingError, Task
from ...rollouts.engines.base import Engine, TeamVersion
from ...rollouts.engines.factory import start_engine
from ...rollouts.episodes.completers import completers
from ...rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from ...rollouts.episodes.runner import EpisodeRunner
from ...rollouts.episodes.store import Store
from ...rollouts.types import Episode
from .. import checkpoint as ckpt
from ..errors import RunError
from ..model.base_models import dtype_of
from ..model.memory_estimate import with_server_memory
from ..update.learner import LearnerBase
from ..weight_sync.probes import probes
from ..weight_sync.publisher import Publisher
from ..weight_sync.sharded_probes import probed_together
from ..weight_sync.team_versions import TeamVersions
from ..weight_sync.verification import VerificationRecord
from .async_rollouts import AsyncCollector, CollectedStep
from .background import BackgroundLoop, BackgroundTask
from .stored_episodes import PlannedEpisodes, find_stored

if TYPE_CHECKING:
    from ..loop.run import Run

T = TypeVar("T")


class RolloutManager:
    """Plays, stores and publishes for a run. `store`, `rollouts` and `background` exist once it is
    open.

    Args:
        engine: a running engine to use instead of starting one; it serves every base and outlives
            the stage.
    """

    background: BackgroundLoop
    store: Store
    rollouts: EpisodeRunner
    ahead: AsyncCollector

    def __init__(self, run: Run, engine: Engine | None = None) -> None:
        self.run, self._given = run, engine
        self.oversampled: dict[
            str, float | int
        ] = {}  # what the last `play` dropped, see `oversample.told`
        self.team = TeamVersions(run.config.max_staleness, pin=run.config.pin)
        self.proofs: dict[str, dict[str, Any]] = {}  # by policy, what the last `prove` found
        self._held: dict[int, contextlib.ExitStack] = {}  # by step: keeps its team version loaded

    def open(self, closing: contextlib.ExitStack) -> None:
        """Open the store, start the engines, publish what is there. `closing` will end what was
        started, in the right order."""
        if self._given is None:
            self.background = BackgroundLoop()
            closing.callback(self.background.close)
        elif not hasattr(
            self, "background"
        ):  # the loop that a given engine works in outlives `close`, as the engine does
            self.background = BackgroundLoop()
        self.store = Store(self.run.config.folder / "episodes")
        closing.callback(self.store.close)
        self._start_engines(closing)
        if self.run.config.pin == "call" and self.exact:
            raise SettingError(
                "pin: call with an engine that repeats itself to the last bit: there a step's"
                " version follows from its number; set pin to episode, or engine to vllm"
            )
        self._crowd = asyncio.Lock()
        self.ahead = AsyncCollector(self, self.run.tasks_of, self.run.config.max_steps)
        closing.callback(self.ahead.close)

    def _start_engines(self, closing: contextlib.ExitStack) -> None:
        run, config = self.run, self.run.config
        self.team = TeamVersions(
            config.max_staleness, self.team.of or run.earlier_team, config.pin
        )  # opened again, or resumed
        if self._given is None:
            on = {base.path: self._specs_on(base) for base in run.bases.values()}
            device = run.ranks.device
            config = with_server_memory(
                config,
                on,
                device,
                lambda path: dtype_of(path, config.dtype, device),
                run.progress.say,
                run.ranks.size if run.ranks.lockstep else 1,
            )
        for base in run.bases.values():
            if self._given is not None and base.publisher is not None:
                continue  # opened again: the engine has kept what was published
            engine = self._given
            if engine is None:
                specs = self._specs_on(base)
                engine = self.background.run(
                    start_engine(
                        base.path,
                        base.tokens,
                        specs,
                        config,
                        folder=config.folder,
                        say=run.progress.say,
                    )
                )
                closing.callback(self._close, engine)
            earlier = base.publisher
            base.engine = engine
            base.publisher = Publisher(
                config.folder / "versions",
                base.adapters,
                engine,
                seed=config.seed,
                proof_every=config.proof_every,
                earlier=run.earlier_versions.get(base.name),
                forward=probed_together(run, base.name) if run.ranks.lockstep else None,
            )
            resumed = [
                VerificationRecord(**record) for record in run.earlier_proofs.get(base.name, ())
            ]
            base.publisher.records = earlier.records if earlier is not None else resumed
            self.background.run(base.publisher.publish(run.step, base.policies))
            if run.step < config.max_steps:
                self._load_again(base.publisher)
            base.publisher.sweep()
        self._in_force(run.step)
        closing.callback(self._let_go, None)
        served = [
            (p, b)
            for b in run.bases.values()
            for p in (*b.policies, *([BASE] if b is self._base_of_base() else []))
        ]
        engine_of = {p: (b.engine, b.tokens) for p, b in served if b.engine is not None}
        self.rollouts = EpisodeRunner(
            run.system,
            completers(run.policies, engine_of),
            run.rewards,
            run.values,
            config.sampling(),
            config.limits(),
            config.seed,
            pin=config.pin,
        )

    def _close(self, engine: Engine) -> None:
        self.background.run(engine.close())

    def _base_of_base(self) -> LearnerBase | None:
        """The base that the policy `base` speaks as, in a team on several: the one its spec names,
        else the run's model."""
        spec = self.run.policies.get(BASE)
        return self.run.bases.get((spec.base if spec else None) or self.run.config.model)

    def _specs_on(self, base: LearnerBase) -> list[PolicySpec]:
        return [self.run.policies[name] for name in base.policies]

    # playing

    def player(self, versions: Mapping[str, str]) -> EpisodeRunner:
        """Rollouts that play with these versions whatever the caller asks for: replays speak as the
        episode did."""
        return dataclasses.replace(self.rollouts, pinned=dict(versions))

    def play(
        self,
        tasks: Sequence[Task],
        label: str,
        step: int,
        rollouts: EpisodeRunner,
        num_generations: int = 1,
        versions: Mapping[str, str] | None = None,
        oversample: int = 0,
    ) -> list[Episode]:
        """The episodes of these tasks, from the store where it has them, else played and stored.
        `versions` None: those in force.

        `oversample`: see `begin`; `oversampled` tells of the last call's.
        """
        chosen = self.run.versions if versions is None else versions
        now, count = self._spoken(chosen), num_generations + oversample
        known = find_stored(
            self.store, tasks, label, count, step, lambda episode: episode.team_version == now
        )
        with self.holding(chosen):
            played = self.begin(label, known, rollouts, chosen, oversample=oversample).result(
                self.run.stop
            )
        self.oversampled = played.oversampled
        return played.episodes

    def begin(
        self,
        label: str,
        known: PlannedEpisodes,
        rollouts: EpisodeRunner,
        versions: TeamVersion | Callable[[], TeamVersion],
        room: asyncio.Semaphore | None = None,
        oversample: int = 0,
    ) -> BackgroundTask[CollectedStep]:
        """Let these episodes be played beside the caller, as `Rollouts.collect` plays, and stored;
        known ones are taken as they are.

        `oversample`: so many of each task are more than is needed, and the slowest are dropped.
        """
        plan, found, run = known.plan, dict(known.found), self.run
        todo = [job for job in plan if job.id not in found]
        if todo and self.exact and not oversample:
            # Played alone, the missing ones would be decoded in other batches: right, but not to
            # the last bit.
            todo = plan

        ended = Counter(
            episode.group
            for episode in found.values()
            if episode.parent is None and episode.error is None
        )
        wanted = {
            group: count - oversample - ended[group]
            for group, count in Counter(job.group for job in plan).items()
        }
        dropped: list[CancelledEpisode] = []

        async def go() -> CollectedStep:
            async with self.alone():
                start = time.perf_counter()
                playing = (
                    first_finished(rollouts, todo, versions, wanted, dropped, room)
                    if oversample
                    else rollouts.collect(todo, versions, room)
                )
                total = len(plan) - oversample * len(wanted)
                with run.progress.episodes(label, total, len(plan) - len(todo), run.metric) as tick:
                    async for episode in playing:
                        if episode.id not in found:
                            self.keep([episode])
                            found[episode.id] = episode
                        tick(episode)
            order = {job.id: number for number, job in enumerate(plan)}
            episodes = sorted(found.values(), key=lambda e: (order.get(e.id, len(order)), e.id))
            extra = (
                drop_statistics([e for e in episodes if e.parent is None], dropped)
                if oversample
                else {}
            )
            return CollectedStep(episodes, time.perf_counter() - start, oversampled=extra)

        return self.background.start(go())

    def perform(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of other plays: replays, drafts, repairs. Ends with `Stopped` when the user or
        the cluster asks."""

        async def go() -> T:
            async with self.alone():
                return await work

        return self.background.run(go(), self.run.stop)

    def alone(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """With an engine that is exact, one crowd plays after the other: which requests are decoded
        together must not depend on chance."""
        return self._crowd if self.exact else contextlib.nullcontext()

    def _spoken(self, versions: Mapping[str, str]) -> dict[str, str]:
        """The part of a team version that episodes name."""
        return {
            agent.policy: versions[agent.policy]
            for agent in self.run.system.specs
            if agent.policy in versions
        }

    @contextlib.contextmanager
    def holding(self, versions: Mapping[str, str]) -> Iterator[None]:
        """Keeps these versions loaded while something plays with them."""
        with contextlib.ExitStack() as held:
            for base in self.run.bases.values():
                if base.publisher is not None:
                    held.enter_context(base.publisher.hold(versions))
            yield

    @property
    def exact(self) -> bool:
        """Do all engines repeat themselves to the last bit, given the same requests in the same
        company?"""
        return all(
            base.engine.info().exact for base in self.run.bases.values() if base.engine is not None
        )

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

    # publishing

    def publish(self, step: int, episodes: Sequence[Episode], final: bool) -> None:
        """Load what moved on every replica and prove it on the step's episodes."""
        self.proofs = {}
        self._let_go(step - self.team.bound)
        for base in self.run.bases.values():
            assert base.publisher is not None
            self.background.run(base.publisher.publish(step, base.policies))
        self.prove(step, episodes, final=final)
        self._in_force(step)

    def _in_force(self, step: int) -> None:
        """Episodes begin with what is published now; those that began with versions of the last S
        steps may go on."""
        self.team.put(step, self._spoken(self.run.versions))
        for recent, version in self.team.of.items():
            if recent not in self._held:
                self._held[recent] = contextlib.ExitStack()
                self._held[recent].enter_context(self.holding(version))

    def _let_go(self, before: int | None = None) -> None:
        """Nobody plays with the team versions before this step (None: with any) any more."""
        for step in [step for step in self._held if before is None or step < before]:
            self._held.pop(step).close()

    def _load_again(self, publisher: Publisher) -> None:
        """Of a resumed run: versions with which episodes of the next steps were begun, or would
        have been."""
        for policy, version in dict.fromkeys(
            item for known in self.team.of.values() for item in known.items()
        ):
            if policy in publisher.versions and not self.background.run(
                publisher.load_again(policy, version)
            ):
                self.run.progress.warn(
                    f"resume: the folder of {version} is gone, so what it would have played is"
                    f" played by {publisher.versions[policy]}"
                )

    def prove(
        self, step: int, episodes: Sequence[Episode], *, final: bool = False, start: bool = False
    ) -> None:
        """The live proof. `start`: of the versions this run began with (resumed, or from `init`),
        on the first tokens they sampled."""
        self.proofs = {}
        for base in self.run.bases.values():
            assert base.publisher is not None
            if start and base.publisher.asked:
                continue
            found = {
                policy: probes(episodes, self.run.agents_of, policy) for policy in base.policies
            }
            try:
                made = self.background.run(base.publisher.prove(step, found, final=final or start))
            finally:
                ckpt.write_json(
                    self.run.config.folder / "proofs.json",
                    [
                        r
                        for b in self.run.bases.values()
                        if b.publisher
                        for r in b.publisher.to_json()
                    ],
                )
            self.proofs |= {p.policy: {"status": p.status, "residual": p.residual} for p in made}
