"""Local training: every policy of a team learns its own turns several times over, and its adapter
is kept along the way, so that one of almost any loss can be taken (A-BAD-BO)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ....agents.seeds import derive_seed
from ....agents.settings import Settings, setting
from ....agents.types import SettingError
from ...batching.samples import TrainingSequence
from ...model.adapters import Adapters
from ...update.learner import Learner
from ...update.minibatches import merge_results, minibatches
from ...update.optimizer_step import UpdateResult
from ..imitation.imitation import by_policy, nll_loss
from .loss_targets import Place

FOLDER = "local_training"  # in the run folder


@dataclass
class LocalTrainingConfig(Settings):
    """How long policies are trained on their own turns, and how often an adapter is kept."""

    num_local_runs: int = setting(
        "training runs of every policy, each in an order of its own: alternatives at one loss",
        3,
        at_least=1,
    )
    num_train_epochs: int = setting("passes of a training run over the kept turns", 5, at_least=1)
    train_batch_size: int = setting("sequences of a policy per optimizer update", 8, at_least=1)
    checkpoint_every: int = setting("updates between kept adapters", 4, at_least=1)


class LocalTraining:
    """Trains the policies of a run, keeps their adapters, and puts kept ones back in.

    Args:
        learner: holds the adapters; every rank has to call what trains or puts in.
        folder: the run's, where `local_training/POLICY/RUN-PLACE` are the kept adapters; all ranks
            read it.
        config: how long, and how often.
    """

    def __init__(self, learner: Learner, folder: Path, config: LocalTrainingConfig) -> None:
        self.learner, self.folder, self.config = learner, folder / FOLDER, config

    def trained(
        self, step: int, sequences: Sequence[TrainingSequence], run: int
    ) -> tuple[dict[str, list[dict[str, Any]]], dict[str, UpdateResult]]:
        """Train every policy from its start, in the order that `run` draws.

        Returns by policy what was kept, the untrained adapter first, as `loss` (mean of -log p over
        all its trained tokens, in nats) and `sha256`; and what the updates did, joined.
        """
        learner, config = self.learner, self.config
        own = by_policy(sequences)
        learner.reset(own)
        kept: dict[str, list[dict[str, Any]]] = {policy: [] for policy in own}
        self._keep(kept, sequences, run)
        seed = derive_seed(learner.config.seed, "local training", run)
        sizes = config.train_batch_size, config.num_train_epochs
        plans = [
            list(minibatches(mine, *sizes, derive_seed(seed, policy)))
            for policy, mine in own.items()
        ]
        last, done = max(map(len, plans)), []
        for number, parts in enumerate(zip_longest(*plans, fillvalue=[]), 1):
            own_parts = [sample for part in parts for sample in part]
            done.append(learner.learn(step, own_parts, nll_loss))
            if number % config.checkpoint_every == 0 or number == last:
                self._keep(kept, sequences, run)
        return kept, merge_results(done)

    def _keep(
        self,
        kept: Mapping[str, list[dict[str, Any]]],
        sequences: Sequence[TrainingSequence],
        run: int,
    ) -> None:
        learner = self.learner
        losses = learner.mean_nll(sequences)
        for policy, rows in kept.items():
            adapters = learner.base_of(policy).adapters
            folder = self._folder(policy, Place(run, len(rows)))
            learner.ranks.on_main(functools.partial(self._save, adapters, policy, folder))
            rows.append({"loss": losses[policy], "sha256": adapters.sha256(policy)})

    def _save(self, adapters: Adapters, policy: str, folder: Path) -> None:
        adapters.save(policy, folder)

    def put_in(self, team: Mapping[str, tuple[Place, str]]) -> None:
        """Let the learner hold these kept adapters (by policy the place and the sha256), with
        optimizers that remember nothing. Raises `SettingError` if a file is gone or another."""
        self.learner.reset(team.keys())
        for policy, (place, sha256) in team.items():
            adapters, folder = self.learner.base_of(policy).adapters, self._folder(policy, place)
            adapters.load(policy, folder)
            if adapters.sha256(policy) != sha256:
                raise SettingError(
                    f"{folder}: not the adapter that was kept there; the run cannot go on without"
                    " it, so begin it anew with overwrite: true"
                )

    def _folder(self, policy: str, place: Place) -> Path:
        return self.folder / policy / f"{place.run:02}-{place.at:04}"
