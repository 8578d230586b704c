"""The learner: every base model with its adapters, optimizers and scalar heads, on every rank.

`Learner` loads the bases, takes the optimizer steps of a method and reads log-probabilities; it
knows neither engines nor files of the run. Adapters without samples must not move: each update
checks it by hash.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from ...agents.types import AgentSpec, PolicySpec, SettingError
from ...rollouts.template_variables import check_read
from ...rollouts.types import TurnKey
from .. import checkpoint as ckpt
from ..batching.samples import TrainingSequence
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..model import sharding
from ..model.base_models import group_by_base
from ..model.memory_estimate import TrainerPlacement, needs_checkpointing
from . import turn_logprobs
from .learner_base import LearnerBase, frozen_base, load_base, trained_bases
from .losses.inputs import LossFn
from .optimizer_step import UpdateOptions, UpdateResult, update
from .scalar_heads import HeadLoss, HeadSpec, ScalarHead, Targets


class UpdateLog(Protocol):
    """What a learner reports to; `monitoring.run_log.RunLog` is the run's."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def sample(self, policy: str, pieces: Sequence[tuple[str, bool]]) -> None: ...

    def spend(self, part: str, seconds: float) -> None: ...

    def trained(self, tokens: int) -> None: ...

    def watch(
        self, sequences: Sequence[TrainingSequence], loss: LossFn
    ) -> tuple[LossFn, dict[str, torch.Tensor]]: ...

    def updated(
        self,
        step: int,
        results: Mapping[str, UpdateResult],
        sequences: Sequence[TrainingSequence],
        ratios: dict[str, torch.Tensor] | None = None,
    ) -> None: ...


class Learner:
    """Adapters, optimizers and scalar heads of a team, the same on every rank.

    Args:
        config: the settings of optimizers, adapters and memory.
        policies: by name, those of the team.
        agents: who speaks as which policy.
        heads: scalar heads that the method learns beside the policies.
        log: where updates are reported.

    `bases` is empty until `load`. `before`: sha256 of every adapter and head as the run began.
    `base_hashes`: sha256 of every base whose weights are loaded.
    `values`: what a team sees of the run's state, of which `NAME.policy` counts here.
    `credit_state`: moving baselines of credit rules. `unfinished`: an update was begun since the
    last finished step.
    """

    ranks: Ranks

    def __init__(
        self,
        config: RunConfig,
        policies: Mapping[str, PolicySpec],
        agents: Sequence[AgentSpec],
        heads: Sequence[HeadSpec],
        log: UpdateLog,
    ) -> None:
        self.config, self.policies, self.agents = config, dict(policies), tuple(agents)
        self.heads, self.log = tuple(heads), log
        self.values: Mapping[str, Any] = {}
        self.bases: dict[str, LearnerBase] = {}
        self.before: dict[str, str] = {}
        self.base_hashes: dict[str, str] = {}
        self.credit_state: dict[str, float] = {}
        self.unfinished = False
        self._measured = False  # how far the first update moved its tokens

    def load(self, ranks: Ranks) -> None:
        """Make the adapters, heads and optimizers of the team, and load every base on which one of
        them learns."""
        config, device, self.ranks = self.config, ranks.device, ranks
        groups = group_by_base(self.policies, config.model)
        learning = trained_bases(groups, self.heads, config.model)
        self.bases = {
            name: load_base(name, specs, config, device, self.heads, self._among)
            if name in learning
            else frozen_base(name, specs, config, device)
            for name, specs in groups.items()
        }
        if self.bases:
            check_read(
                config.template_variables(), [b.tokens.variables for b in self.bases.values()]
            )
        if needs_checkpointing(self.placement, self.log.say):
            for name in learning:
                self.bases[name].adapters.checkpoint_activations()
        if learning and self._among is not None:
            self.log.say(f"shard_base: the base's layers are split over {ranks.size} ranks")
        self.before = self.hashes() | self._head_hashes("adapter")
        self.base_hashes = {
            name: self.bases[name].adapters.base_sha256() for name in groups if name in learning
        }

    @property
    def _among(self) -> Ranks | None:
        """The ranks that the bases are split over; None: each has them whole."""
        return self.ranks if sharding.sharding_mode(self.config.shard_base) else None

    @property
    def placement(self) -> TrainerPlacement:
        """The bases that this trainer holds and where it computes."""
        return TrainerPlacement(
            self.config,
            {base.path: [self.policies[p] for p in base.policies] for base in self.bases.values()},
            self.ranks.device,
            1 if self._among is None else self.ranks.size,
            frozenset(base.path for base in self.bases.values() if base.weightless),
        )

    def load_weights(self, name: str) -> None:
        """Load the weights of a base that had none here, because a forward pass on it is asked
        for. Its adapters are those of now, and still nothing learns on it. Every rank has to call
        it."""
        base = self.bases[name]
        if not base.weightless:
            return
        self.log.say(
            f"base {name}: loaded for log-probabilities, although nothing on it is trained"
        )
        specs = [self.policies[policy] for policy in base.policies]
        loaded = load_base(name, specs, self.config, self.ranks.device, (), self._among)
        for policy in base.policies:
            loaded.adapters.copy(policy, base.adapters)
        base.adapters, base.optimizers = loaded.adapters, loaded.optimizers
        self.base_hashes[name] = base.adapters.base_sha256()

    # what learns

    def hashes(self, without: Collection[str] = ()) -> dict[str, str]:
        """sha256 of every policy's adapter, `without` those that may move."""
        return {
            p: b.adapters.sha256(p)
            for b in self.bases.values()
            for p in b.policies
            if p not in without
        }

    def check_bases(self) -> None:
        """Raise `RunError` if a base's own weights are not those that were loaded."""
        for name, sha256 in self.base_hashes.items():
            if self.bases[name].adapters.base_sha256() != sha256:
                raise RunError(f"base {name}: its weights changed during the run; they must not")

    def _head_hashes(self, key: str) -> dict[str, str]:
        """sha256 of every head, by its adapter's name or (`name`) its own."""
        return {
            h.adapter if key == "adapter" else h.spec.name: h.sha256()
            for b in self.bases.values()
            for h in b.heads.values()
        }

    @property
    def trained(self) -> list[str]:
        """Policies whose adapter is no longer the bare base."""
        return [p for b in self.bases.values() for p in b.policies if b.adapters.is_trained(p)]

    @property
    def trainable(self) -> list[str]:
        """Policies that learn in this run."""
        return [name for base in self.bases.values() for name in base.adapters.trainable]

    @property
    def spoken_policies(self) -> dict[str, str]:
        """Agent -> policy that it speaks with now."""
        return {a.name: self.values.get(f"{a.name}.policy") or a.policy for a in self.agents}

    @property
    def policy_of(self) -> dict[str, str]:
        """Agent -> policy that it speaks with now, for agents whose policy learns in this run."""
        learning = set(self.trainable)
        return {agent: p for agent, p in self.spoken_policies.items() if p in learning}

    def base_of(self, policy: str) -> LearnerBase:
        """The base on which this policy stands."""
        return next(base for base in self.bases.values() if policy in base.policies)

    def head(self, name: str) -> ScalarHead:
        """The scalar head of this name."""
        return next(base.heads[name] for base in self.bases.values() if name in base.heads)

    def reset(self, policies: Collection[str]) -> None:
        """Put these policies' adapters back to their `init`, with optimizers that remember
        nothing."""
        for base in self.bases.values():
            for policy in base.adapters.trainable:
                if policy in policies:
                    base.adapters.restart(policy)
                    base.optimizers.of[policy].state.clear()

    # updates

    def learn(
        self,
        step: int,
        sequences: Sequence[TrainingSequence],
        loss: LossFn,
        options: UpdateOptions = UpdateOptions(),
    ) -> dict[str, UpdateResult]:
        """Update every adapter that has sequences; returns each policy's result.

        A loss or gradient that is not finite changes nothing; the log dumps its samples. Raises
        `RunError` if an adapter without sequences moved.
        """
        start, self.unfinished = time.perf_counter(), True
        moving = {s.policy for s in sequences}.intersection(self.trainable)
        before = self.hashes(without=moving)
        options = dataclasses.replace(options, measure=step == 1 and not self._measured)
        self._measured = True
        loss, ratios = self.log.watch(sequences, loss)
        results: dict[str, UpdateResult] = {}
        for base in self.bases.values():
            results |= update(base.optimizers, sequences, loss, step, self.ranks, options)
        for policy, sha256 in self.hashes(without=moving).items():
            if sha256 != before[policy]:
                raise RunError(f"step {step}: adapter {policy!r} moved without samples of its own")
        self.log.updated(step, results, sequences, ratios)
        self.log.spend("train", time.perf_counter() - start)
        return results

    def learn_head(
        self,
        step: int,
        name: str,
        sequences: Sequence[TrainingSequence],
        targets: Targets,
        loss: HeadLoss,
    ) -> UpdateResult:
        """One update of a scalar head, see `ScalarHead.learn`. No policy moves; what is not finite
        changes nothing and is dumped."""
        start, self.unfinished, before = time.perf_counter(), True, self.hashes()
        head = self.head(name)
        result = head.learn(sequences, targets, loss, step, self.ranks)
        moved = [policy for policy, sha256 in self.hashes().items() if sha256 != before[policy]]
        if moved:
            raise RunError(f"step {step}: adapter {moved[0]!r} moved while head {name!r} learnt")
        own = [dataclasses.replace(sequence, policy=head.adapter) for sequence in sequences]
        self.log.updated(step, {head.adapter: result}, own)
        self.log.spend("train", time.perf_counter() - start)
        return result

    # log-probabilities

    def turn_logprobs(
        self, sequences: Sequence[TrainingSequence], *, reference: bool = False
    ) -> dict[TurnKey, float]:
        """log p of every trained turn, now or (`reference`) under the policy as the run began: see
        `turn_logprobs.by_turn`."""
        start = time.perf_counter()
        values = turn_logprobs.by_turn(self, sequences, reference)
        self.log.spend("train", time.perf_counter() - start)
        return values

    def reference_logprobs(self, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
        """log p of every trained token [N] under its policy as the run began."""
        return turn_logprobs.under_reference(self, sequences)

    def mean_nll(
        self, sequences: Sequence[TrainingSequence], judges: Mapping[str, str] | None = None
    ) -> dict[str, float]:
        """Per policy the mean of -log p over its trained tokens, in nats: see
        `turn_logprobs.mean_nll`."""
        return turn_logprobs.mean_nll(self, sequences, judges)

    def show(self, sequences: Sequence[TrainingSequence]) -> None:
        """Print one sequence per policy with its mask: read this before believing any curve."""
        for policy in dict.fromkeys(sequence.policy for sequence in sequences):
            sequence = next(s for s in sequences if s.policy == policy)
            tokens = self.base_of(policy).tokens
            runs = itertools.groupby(
                zip(sequence.ids, sequence.mask, strict=True), key=lambda item: item[1]
            )
            self.log.sample(
                policy, [(tokens.show([i for i, _ in run]), bool(mask)) for mask, run in runs]
            )

    # checkpoints

    def save(self, folder: Path) -> None:
        """Write adapters, optimizer states and heads into a checkpoint's folder."""
        for base in self.bases.values():
            for policy in base.policies:
                base.adapters.save(policy, folder / "adapters" / policy)
            for policy in base.adapters.trainable:
                ckpt.write_tensors(
                    folder / "trainer" / f"{policy}.safetensors", base.optimizers.state(policy)
                )
            for head in base.heads.values():
                path = head.save(folder / "trainer" / "heads" / head.spec.name)
                ckpt.write_tensors(path / "optimizer.safetensors", head.state())

    def restore(self, folder: Path, adapters: Mapping[str, Any], heads: Mapping[str, str]) -> None:
        """Read them back. `adapters`: of `system.json`, by policy with `sha256`; `heads`: sha256 by
        name. Raises `SettingError` where they are missing or not those."""
        for base in self.bases.values():
            for policy in base.policies:
                if policy not in adapters and not self.policies[policy].trainable:
                    continue  # a helper's, which is no part of a checkpoint
                if policy not in adapters:
                    raise SettingError(
                        f"{folder}: holds no adapter {policy!r}; it has {', '.join(adapters)}"
                    )
                base.adapters.load(policy, folder / "adapters" / policy)
                if base.adapters.sha256(policy) != adapters[policy]["sha256"]:
                    raise SettingError(
                        f"{folder}: adapter {policy!r} is not the one system.json names"
                    )
            for policy in base.adapters.trainable:
                path = folder / "trainer" / f"{policy}.safetensors"
                if not path.exists():
                    raise SettingError(
                        f"{folder}: no optimizer state of {policy!r}; it was not trainable in the"
                        " earlier run"
                    )
                base.optimizers.load(policy, load_file(path))
            for name, head in base.heads.items():
                path = folder / "trainer" / "heads" / name
                if not path.is_dir():
                    raise SettingError(
                        f"{folder}: holds no head {name!r}; the earlier run was of another method"
                        " or of other settings"
                    )
                head.load(path)
                head.load_state(load_file(path / "optimizer.safetensors"))
                if head.sha256() != heads[name]:
                    raise SettingError(
                        f"{folder}: head {name!r} is not the one that state.json names"
                    )

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.json` that is the learner's; tensors are written by `save`."""
        return {
            "credit": self.credit_state,
            "heads": self._head_hashes("name"),
            "sha256_before": self.before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.credit_state.update(state["credit"])
        self.before = state["sha256_before"]
