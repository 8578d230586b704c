"""The engines of a run, one per base model (rank 0)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ...agents.types import BASE, PolicySpec
from ...rollouts.engines.base import Engine
from ...rollouts.engines.factory import start_engine
from ...rollouts.episodes.completers import Completer, completers
from ..config import RunConfig
from ..model.memory_estimate import with_server_memory
from ..update.learner import Learner
from ..update.learner_base import LearnerBase
from .background import BackgroundLoop, unless_gone


class EngineGroup:
    """Starts and closes the engines that serve a team's bases.

    Args:
        config: engine settings of the run.
        learner: the bases to serve; it shares their device.
        given: a running engine to use instead of starting one; it serves every base and outlives
            `close`.

    `of`: engine by base, once open.
    """

    def __init__(self, config: RunConfig, learner: Learner, given: Engine | None = None) -> None:
        self.config, self.learner, self.given = config, learner, given
        self.of: dict[str, Engine] = {}

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
