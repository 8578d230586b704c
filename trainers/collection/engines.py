"""The engines of a run, one per base model: started by rank 0, asked by every rank that plays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ...agents.types import BASE, PolicySpec
from ...rollouts.engines.base import Engine, EngineError
from ...rollouts.engines.factory import address_of, attach_engine, revive_servers, start_engine
from ...rollouts.episodes.completers import Completer, completers
from ..config import RunConfig
from ..model.memory_estimate import with_server_memory
from ..update.learner import Learner
from ..update.learner_base import LearnerBase
from .background import BackgroundLoop, unless_gone

POLL = 5.0  # seconds between two looks at servers that other ranks ask


class EngineGroup:
    """Starts and closes the engines that serve a team's bases.

    Args:
        config: engine settings of the run.
        learner: the bases to serve; it shares their device.
        given: a running engine to use instead of starting one; it serves every base and outlives
            `close`.

    `of`: engine by base, once open; on another rank than 0, once attached.
    """

    def __init__(self, config: RunConfig, learner: Learner, given: Engine | None = None) -> None:
        self.config, self.learner, self.given = config, learner, given
        self.of: dict[str, Engine] = {}
        self._known: dict[str, asyncio.Task[Any]] = {}  # adapter versions, of a given engine

    def open(
        self, background: BackgroundLoop, say: Callable[[str], None], closing: contextlib.ExitStack
    ) -> None:
        """Start an engine per base in `background`. `closing` will close those that were started
        here."""
        if self.given is not None:
            self.of = dict.fromkeys(self.learner.bases, self.given)
            return
        config = self._with_memory(say) if self.learner.bases else self.config
        for base in self.learner.bases.values():
            engine = background.run(
                start_engine(
                    base.path,
                    base.tokens,
                    self._specs_on(base),
                    config,
                    folder=config.folder,
                    say=say,
                    staleness=config.max_staleness,
                )
            )
            closing.callback(self._close, background, engine)
            self.of[base.name] = engine

    def addresses(self) -> dict[str, dict[str, Any] | None]:
        """By base, what other ranks need to ask the same servers; None where each has an engine of
        its own that was given to it."""
        return {name: address_of(engine) for name, engine in self.of.items()}

    async def look_after(self, warn: Callable[[str], None]) -> None:
        """On rank 0, while other ranks ask its engines: start servers that die again, also while
        this rank asks for nothing. Ends, with a warning, when one has died too often; whoever asks
        it next gets the error."""
        while True:
            await asyncio.sleep(POLL)
            try:
                for engine in self.of.values():
                    await revive_servers(engine)
            except EngineError as error:
                warn(f"servers are looked after no more: {error}")
                return

    def attach(
        self,
        addresses: Mapping[str, Mapping[str, Any] | None],
        background: BackgroundLoop,
        closing: contextlib.ExitStack,
    ) -> None:
        """On another rank than 0: ask the engines of rank 0 from now on. Raises `SettingError` or
        `EngineError` if they cannot be asked from here."""
        for name, address in addresses.items():
            if address is not None:
                base, folder = self.learner.bases[name], self.config.folder
                engine = attach_engine(address, base.tokens, self.config, folder)
                closing.callback(self._close, background, engine)
                self.of[name] = engine
            elif self.given is None:
                raise EngineError("the engine was given to rank 0 alone")
            else:
                self.of[name] = self.given

    async def publish(self, versions: Mapping[str, str]) -> None:
        """On another rank than 0: let a given engine know the versions that rank 0 has published.
        Servers know them."""
        for policy, version in versions.items():
            if self.given is None or not version or address_of(self.given) is not None:
                continue
            if version not in self._known:
                folder = self.config.folder / "versions" / version
                self._known[version] = asyncio.ensure_future(self.given.publish({policy: folder}))
            await self._known[version]

    def _with_memory(self, say: Callable[[str], None]) -> Any:
        """The settings with the share of memory that servers may take beside this trainer."""
        return with_server_memory(self.learner.placement, say)

    def _close(self, background: BackgroundLoop, engine: Engine) -> None:
        with unless_gone():
            background.run(engine.close())

    def _specs_on(self, base: LearnerBase) -> list[PolicySpec]:
        return [self.learner.policies[name] for name in base.policies]

    @property
    def deterministic(self) -> bool:
        """Do all engines repeat themselves to the last bit, given the same requests in the same
        company, and does no agent speak as an outside model, which does not?"""
        policies = self.learner.policies
        speak = [policies[a.policy] for a in self.learner.agents if a.policy in policies]
        if not self.of or any(policy.url for policy in speak):
            return False
        return all(engine.info().deterministic for engine in self.of.values())

    def completers(self) -> Mapping[str, Completer]:
        """By policy, what answers its chats.

        The policy `base` speaks as one base only: the one its spec names, else the run's model.
        """
        learner = self.learner
        spec = learner.policies.get(BASE)
        bare = (spec.base if spec else None) or self.config.model
        engine_of = {
            policy: (self.of[base.name], base.tokens)
            for base in learner.bases.values()
            for policy in (*base.policies, *([BASE] if base.name == bare else []))
        }
        return completers(learner.policies, engine_of)
