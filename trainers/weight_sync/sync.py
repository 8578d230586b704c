"""Weight sync: adapters that moved are loaded by the engines and verified there (rank 0).

`advance` is the one act of a step: publish what the learner holds, verify it on every replica, then
let episodes begin with it and with the values of the moment. Adapter versions of the last S steps
(`max_staleness`) stay loaded for the episodes that began with them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from ...agents.state import TeamState, outside_models
from ...agents.types import from_json, to_json
from ...rollouts.engines.base import Engine
from ...rollouts.types import Episode
from ..config import RunConfig
from ..errors import RunError
from ..update.learner import Learner
from ..update.learner_base import LearnerBase
from .probes import probes
from .publisher import Publisher
from .sharded_probes import probed_together
from .team_states import TeamStates
from .verification import VerificationRecord

Perform = Callable[[Coroutine[Any, Any, Any]], Any]  # runs a coroutine to its end
Record = Callable[[list[dict[str, object]]], None]  # writes down every verification so far


class WeightSync:
    """Publishes and verifies the learner's adapters.

    Args:
        config: `proof_every`, `max_staleness`, `pin`, seed and folder of the run.
        learner: whose adapters are served.
        values: what a team sees of the run's state, by name; changed in place by the run.
        record: is given all verification records after each verification.

    `publishers`: by base, while open and after. `team`: which state was in force at which step.
    `origin`: the state that the run began with; its versions stay on disk.
    `verified`: status and residual by policy, of the last `verify`.
    """

    def __init__(
        self, config: RunConfig, learner: Learner, values: Mapping[str, Any], record: Record
    ) -> None:
        self.config, self.learner, self.values, self.record = config, learner, values, record
        self.publishers: dict[str, Publisher] = {}
        self.team = TeamStates(config.max_staleness, pin=config.pin)
        self.origin = TeamState()
        self.verified: dict[str, dict[str, Any]] = {}
        self._earlier_records: dict[str, list[dict[str, Any]]] = {}  # of the run that is resumed
        self._earlier_versions: dict[str, dict[str, str]] = {}
        self._held: dict[int, contextlib.ExitStack] = {}  # by step: keeps its team version loaded
        # trials that have begun: the versions before each, and what keeps loaded what it published
        self._trials: list[tuple[dict[str, str], contextlib.ExitStack]] = []

    def open(
        self,
        engines: Mapping[str, Engine],
        perform: Perform,
        step: int,
        closing: contextlib.ExitStack,
        alone: Perform | None = None,
    ) -> None:
        """Publish what is there after `step` on the engines (by base). `closing` will release what
        is held. `alone`: performs what asks for replies that must not be decoded with others."""
        self._perform, self._alone = perform, alone or perform
        for name, base in self.learner.bases.items():
            if name in self.publishers and self.publishers[name].engine is engines[name]:
                continue  # opened again: the engine has kept what was published
            self._open_base(base, engines[name], step)
        if step == 0:
            self.origin = self.named(self.state)
        self.put_in_force(step)
        closing.callback(self._release, None)

    def _open_base(self, base: LearnerBase, engine: Engine, step: int) -> None:
        config, ranks = self.config, self.learner.ranks
        publisher = Publisher(
            config.folder / "versions",
            base.adapters,
            engine,
            seed=config.seed,
            proof_every=config.proof_every,
            earlier=self._earlier_versions.get(base.name),
            forward=probed_together(ranks, base.name) if ranks.lockstep else None,
        )
        publisher.records = (
            self.publishers[base.name].records
            if base.name in self.publishers
            else [VerificationRecord(**r) for r in self._earlier_records.get(base.name, ())]
        )
        self.publishers[base.name] = publisher
        self._perform(publisher.publish(step, base.policies))
        if step < config.max_steps:
            self._reload(publisher)
        publisher.keep = frozenset(self.origin.versions.values())
        publisher.remove_leftovers()

    @property
    def current(self) -> dict[str, str]:
        """The adapter versions to play with. An untrained adapter is the base to the last bit, and
        the base is faster, so it is left out."""
        trained = self.learner.trained
        return {
            policy: version
            for publisher in self.publishers.values()
            for policy, version in publisher.versions.items()
            if policy in trained
        }

    @property
    def published(self) -> dict[str, str]:
        """The version of every policy, of untrained ones too."""
        return {
            policy: version
            for publisher in self.publishers.values()
            for policy, version in publisher.versions.items()
        }

    @property
    def state(self) -> TeamState:
        """The state to play with: the adapter versions, the values of the moment, and which outside
        models answer."""
        values = json.loads(json.dumps(to_json(self.values)))  # what is changed later is another
        return TeamState(self.current, values, outside_models(self.learner.policies))

    def named(self, state: TeamState) -> TeamState:
        """The part of a state that episodes name: the versions of policies that agents speak as, in
        the order of agents."""
        speak = (
            state.values.get(f"{agent.name}.policy") or agent.policy
            for agent in self.learner.agents
        )
        return state.of(list(dict.fromkeys(speak)))

    @contextlib.contextmanager
    def hold(self, versions: Mapping[str, str]) -> Iterator[None]:
        """Keep these versions loaded while something plays with them; one that was retired is
        loaded again. Raises `RunError` if its folder is gone."""
        with contextlib.ExitStack() as holds:
            for publisher in self.publishers.values():
                for policy, version in versions.items():
                    if policy in publisher.versions and not self._perform(
                        publisher.reload(policy, version)
                    ):
                        raise RunError(
                            f"adapter version {version}: its folder is gone from {publisher.root},"
                            " so what it answers cannot be played again"
                        )
                holds.enter_context(publisher.hold(versions))
            yield

    def advance(self, step: int, episodes: Sequence[Episode], *, final: bool) -> None:
        """Load what moved on every replica, verify it on the step's episodes, and put it in force.
        `final`: verify whatever `proof_every` says. Raises `WeightMismatch`."""
        self.verified = {}
        self._release(step - self.team.bound)
        self.publish(step)
        self.verify(step, episodes, final=final)
        self.put_in_force(step)

    def publish(self, step: int) -> dict[str, str]:
        """Load what moved on every replica; the team version after it."""
        for name, publisher in self.publishers.items():
            self._perform(publisher.publish(step, self.learner.bases[name].policies))
        return self.current

    def begin_trial(self) -> None:
        """What is published until `end_trial` stays loaded: it may be published again, and a
        version that was retired never has its name back."""
        self._trials.append((self.published, contextlib.ExitStack()))
        self._keep_loaded()

    def try_out(self, step: int) -> None:
        """Publish what the learner holds in the middle of a step, to measure it."""
        self.publish(step)
        self._keep_loaded()

    def end_trial(self, step: int, adopted: bool) -> None:
        """Publish again what was there before the trial, under the names that it had; nothing if it
        was adopted."""
        before, held = self._trials.pop()
        with held:
            if not adopted:
                for publisher in self.publishers.values():
                    publisher.earlier.update(before)
                self.publish(step)

    def _keep_loaded(self) -> None:
        _, held = self._trials[-1]
        held.enter_context(self._hold_loaded(self.published))

    def verify(
        self, step: int, episodes: Sequence[Episode], *, final: bool = False, start: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Compare served and trained adapters on sampled turns; status and residual by policy.

        `start`: only of versions this run began with (resumed, or from `init`) and that were never
        verified, on the first tokens they sampled. Raises `WeightMismatch` after recording all.
        """
        self.verified = {}
        for name, publisher in self.publishers.items():
            if start and publisher.asked:
                continue
            turns = {
                policy: probes(episodes, policy) for policy in self.learner.bases[name].policies
            }
            try:
                records = self._alone(publisher.verify(step, turns, final=final or start))
            finally:
                self.record([r for p in self.publishers.values() for r in p.to_json()])
            self.verified |= {
                r.policy: {"status": r.status, "residual": r.residual} for r in records
            }
        return self.verified

    def put_in_force(self, step: int) -> None:
        """Episodes begin with what is published now; those that began with states of the last S
        steps may go on."""
        self.team.put(step, self.named(self.state))
        for recent, state in self.team.of.items():
            if recent not in self._held:
                self._held[recent] = contextlib.ExitStack()
                self._held[recent].enter_context(self._hold_loaded(state.versions))

    @contextlib.contextmanager
    def _hold_loaded(self, versions: Mapping[str, str]) -> Iterator[None]:
        """Keep what of these versions is loaded."""
        with contextlib.ExitStack() as holds:
            for publisher in self.publishers.values():
                holds.enter_context(publisher.hold(versions))
            yield

    def _release(self, before: int | None = None) -> None:
        """No episode plays with the states before this step (None: with any) any more."""
        for step in [step for step in self._held if before is None or step < before]:
            self._held.pop(step).close()

    def _reload(self, publisher: Publisher) -> None:
        """Of a resumed run: load versions with which episodes of the next steps were begun, or
        would have been."""
        for policy, version in dict.fromkeys(
            item for known in self.team.of.values() for item in known.versions.items()
        ):
            if policy in publisher.versions and not self._perform(
                publisher.reload(policy, version)
            ):
                self.learner.log.warn(
                    f"resume: the folder of {version} is gone, so what it would have played is"
                    f" played by {publisher.versions[policy]}"
                )

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.json` that is weight sync's."""
        return {
            "proofs": {name: p.to_json() for name, p in self.publishers.items()},
            "versions": {name: p.versions for name, p in self.publishers.items()},
            "team": {str(step): to_json(state) for step, state in self.team.of.items()},
            "origin": to_json(self.origin),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._earlier_records, self._earlier_versions = state["proofs"], state["versions"]
        self.origin = _state(state.get("origin", {"versions": {}}))  # 0.1 began with the base
        # absent in checkpoints from before runs could play ahead
        known = {int(step): _state(saved) for step, saved in state.get("team", {}).items()}
        self.team = TeamStates(self.config.max_staleness, known, self.config.pin)


def _state(saved: Mapping[str, Any]) -> TeamState:
    """A state of a checkpoint; one of 0.1 names the adapter versions alone."""
    return from_json(TeamState, saved) if "versions" in saved else TeamState(dict(saved))
