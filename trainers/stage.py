"""What rank 0 has and the other ranks have not: the loop beside the trainer, the store, the engines with their publishers, and who plays."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..agents.types import BASE, PolicySpec, Task
from ..rollouts.engines.engine import Engine
from ..rollouts.engines.start import start_engine
from ..rollouts.oversample import Dropped, collect_first, told
from ..rollouts.play import Rollouts
from ..rollouts.speakers import speakers
from ..rollouts.store import Store
from ..rollouts.types import Episode
from . import checkpoint as ckpt
from .bases import Base, dtype_of
from .config import RunError
from .memory import placed
from .publish import Proof, Publisher, probes
from .recall import recall
from .shard import probed_together
from .threads import Background

if TYPE_CHECKING:
    from .run import Run


class Stage:
    """Plays, stores and publishes for a run. `store`, `rollouts` and `background` exist once it is open.

    Args:
        engine: a running engine to use instead of starting one; it serves every base and outlives the stage.
    """

    background: Background
    store: Store
    rollouts: Rollouts

    def __init__(self, run: Run, engine: Engine | None = None) -> None:
        self.run, self._given = run, engine
        self.oversampled: dict[str, float | int] = {}  # what the last `play` dropped, see `oversample.told`
        self.proofs: dict[str, dict[str, Any]] = {}  # by policy, what the last `prove` found

    def open(self, closing: contextlib.ExitStack) -> None:
        """Open the store, start the engines, publish what is there. `closing` will end what was started, in the right order."""
        if self._given is None:
            self.background = Background()
            closing.callback(self.background.close)
        elif not hasattr(self, "background"):  # the loop that a given engine works in outlives `close`, as the engine does
            self.background = Background()
        self.store = Store(self.run.config.folder / "episodes")
        closing.callback(self.store.close)
        self._start_engines(closing)

    def _start_engines(self, closing: contextlib.ExitStack) -> None:
        run, config = self.run, self.run.config
        if self._given is None:
            on = {base.path: self._specs_on(base) for base in run.bases.values()}
            device = run.ranks.device
            config = placed(
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
                    start_engine(base.path, base.tokens, specs, config, folder=config.folder, say=run.progress.say)
                )
                closing.callback(self._close, engine)
            earlier = base.publisher
            base.engine = engine
            base.publisher = Publisher(
                config.folder / "versions", base.adapters, engine, seed=config.seed, proof_every=config.proof_every,
                earlier=run.earlier_versions.get(base.name),
                forward=probed_together(run, base.name) if run.ranks.lockstep else None,
            )  # fmt: skip
            resumed = [Proof(**record) for record in run.earlier_proofs.get(base.name, ())]
            base.publisher.records = earlier.records if earlier is not None else resumed
            self.background.run(base.publisher.publish(run.step, base.policies))
        served = [(p, b) for b in run.bases.values() for p in (*b.policies, *([BASE] if b is self._base_of_base() else []))]
        engine_of = {p: (b.engine, b.tokens) for p, b in served if b.engine is not None}
        self.rollouts = Rollouts(
            run.system, speakers(run.policies, engine_of), run.rewards, run.values, config.sampling(),
            config.limits(), config.seed,
        )  # fmt: skip

    def _close(self, engine: Engine) -> None:
        self.background.run(engine.close())

    def _base_of_base(self) -> Base | None:
        """The base that the policy `base` speaks as, in a team on several: the one its spec names, else the run's model."""
        spec = self.run.policies.get(BASE)
        return self.run.bases.get((spec.base if spec else None) or self.run.config.model)

    def _specs_on(self, base: Base) -> list[PolicySpec]:
        return [self.run.policies[name] for name in base.policies]

    # playing

    def player(self, versions: Mapping[str, str]) -> Rollouts:
        """Rollouts that play with these versions whatever the caller asks for: replays speak as the episode did."""
        return dataclasses.replace(self.rollouts, pinned=dict(versions))

    def play(
        self, tasks: Sequence[Task], label: str, step: int, rollouts: Rollouts, num_generations: int = 1,
        versions: Mapping[str, str] | None = None, oversample: int = 0,
    ) -> list[Episode]:  # fmt: skip
        """The episodes of these tasks, from the store where it has them, else played and stored. `versions` None: those in force.

        `oversample`: as many more of each task begin, and the slowest are dropped; `oversampled` tells of the last call's.
        """
        run = self.run
        versions = run.versions if versions is None else versions
        now = {agent.policy: versions[agent.policy] for agent in run.system.specs if agent.policy in versions}
        plan, found = recall(self.store, tasks, label, num_generations + oversample, step, now)
        todo = [job for job in plan if job.id not in found]
        if todo and self.exact and not oversample:
            # Played alone, the missing ones would be decoded in other batches: right, but not to the last bit.
            todo = plan

        ended = Counter(episode.group for episode in found.values() if episode.parent is None and episode.error is None)
        wanted = {job.group: num_generations - ended[job.group] for job in plan}
        dropped: list[Dropped] = []

        async def go() -> None:
            playing = collect_first(rollouts, todo, versions, wanted, dropped) if oversample else rollouts.collect(todo, versions)
            with run.progress.episodes(label, len(tasks) * num_generations, len(plan) - len(todo), run.metric) as tick:
                async for episode in playing:
                    if episode.id not in found:
                        self.keep([episode])
                        found[episode.id] = episode
                    tick(episode)

        with self.holding(versions):
            self.background.run(go(), run.stop)
        self.oversampled = told([e for e in found.values() if e.parent is None], dropped) if oversample else {}
        order = {job.id: number for number, job in enumerate(plan)}
        return sorted(found.values(), key=lambda e: (order.get(e.id, len(order)), e.id))

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
        """Do all engines repeat themselves to the last bit, given the same requests in the same company?"""
        return all(base.engine.info().exact for base in self.run.bases.values() if base.engine is not None)

    def keep(self, episodes: Sequence[Episode]) -> None:
        """Store these episodes: all or none of them."""
        try:
            self.store.extend(episodes)
        except OSError as error:
            named = ", ".join(e.id for e in episodes[:3])
            raise RunError(
                f"episode {named} could not be stored in {self.store.folder}: {error}; earlier ones are whole"
            ) from error

    # publishing

    def publish(self, step: int, episodes: Sequence[Episode], final: bool) -> None:
        """Load what moved on every replica and prove it on the step's episodes."""
        self.proofs = {}
        for base in self.run.bases.values():
            assert base.publisher is not None
            self.background.run(base.publisher.publish(step, base.policies))
        self.prove(step, episodes, final=final)

    def prove(self, step: int, episodes: Sequence[Episode], *, final: bool = False, start: bool = False) -> None:
        """The live proof. `start`: of the versions this run began with (resumed, or from `init`), on the first tokens they sampled."""
        self.proofs = {}
        for base in self.run.bases.values():
            assert base.publisher is not None
            if start and base.publisher.asked:
                continue
            found = {policy: probes(episodes, self.run.agents_of, policy) for policy in base.policies}
            try:
                made = self.background.run(base.publisher.prove(step, found, final=final or start))
            finally:
                ckpt.write_json(
                    self.run.config.folder / "proofs.json",
                    [r for b in self.run.bases.values() if b.publisher for r in b.publisher.to_json()],
                )
            self.proofs |= {p.policy: {"status": p.status, "residual": p.residual} for p in made}
