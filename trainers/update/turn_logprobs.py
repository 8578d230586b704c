"""Log-probabilities of sequences without a gradient: of whole turns, under the policy as the run
began, and as means per policy.

All three read through `_read`: one forward pass per base and policy, every rank computing its
share; the results are the same on every rank. A base on which nothing learns gets its weights when
it is first read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ...agents.types import BASE, PolicySpec
from ...rollouts.types import TurnKey
from ..batching.batches import Layout
from ..batching.samples import TrainingSequence
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..model.adapters import Adapters
from ..model.logprobs import token_logprobs
from .initial_policy import initial_weights, together
from .optimizer_step import Optimizers, forward_only


class ReadableBase(Protocol):
    """What is read of a `LearnerBase`."""

    name: str
    adapters: Adapters
    optimizers: Optimizers

    @property
    def policies(self) -> tuple[str, ...]: ...


class Reader(Protocol):
    """What is read of a `Learner`."""

    config: RunConfig
    policies: dict[str, PolicySpec]
    ranks: Ranks

    @property
    def bases(self) -> Mapping[str, ReadableBase]: ...

    def load_weights(self, name: str) -> None: ...


def by_turn(
    learner: Reader, sequences: Sequence[TrainingSequence], reference: bool
) -> dict[TurnKey, float]:
    """log p of every trained turn, summed over its tokens, at temperature 1 if the sequences were
    made for it.

    `reference`: under the policy as the run began, which is the base with adapters off unless the
    policy has an `init`. Raises `RunError` at a log-prob that is not finite.
    """
    values: dict[TurnKey, float] = {}
    bare = learner.policies.get(BASE)
    for base in learner.bases.values():
        speaks = bare is not None and (bare.base or learner.config.model) == base.name
        for policy in (*base.policies, *([BASE] if speaks else [])):
            own = [sequence for sequence in sequences if sequence.policy == policy]
            if own:
                tokens = _read(learner, base, own, policy, initial=reference)
                values |= _sums([key for sequence in own for key in sequence.keys], tokens)
    for (episode, turn, _), value in values.items():
        if not math.isfinite(value):
            raise RunError(
                f"episode {episode}, turn {turn}: its log-probability is {value}; the policy has"
                " diverged"
            )
    return values


def under_reference(learner: Reader, sequences: Sequence[TrainingSequence]) -> torch.Tensor:
    """log p of every trained token [N] under its policy as the run began (the base with adapters
    off, unless it has an `init`), at the temperature it was sampled at."""
    counts = [sequence.num_trained for sequence in sequences]
    parts = list(torch.zeros(sum(counts)).split(counts))
    for base in learner.bases.values():
        for policies in together(base.adapters, base.policies):
            mine = [n for n, sequence in enumerate(sequences) if sequence.policy in policies]
            if not mine:
                continue
            tokens = _read(learner, base, [sequences[n] for n in mine], policies[0], initial=True)
            for number, part in zip(mine, tokens.split([counts[n] for n in mine]), strict=True):
                parts[number].copy_(part)
    return torch.cat(parts)


def mean_nll(
    learner: Reader, sequences: Sequence[TrainingSequence], judges: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Per policy the mean of -log p over the trained tokens of its sequences, unweighted, in nats.
    Every rank has to call it.

    Args:
        judges: whose weights judge a policy's sequences (another policy, or `base`); a policy that
            is missing judges its own.
    """
    means: dict[str, float] = {}
    for base in learner.bases.values():
        authors = {sequence.policy for sequence in sequences if sequence.policy in base.policies}
        for policy in sorted(authors):
            own = [sequence for sequence in sequences if sequence.policy == policy]
            tokens = _read(learner, base, own, (judges or {}).get(policy, policy))
            means[policy] = -float(tokens.double().mean())
    return means


def _read(
    learner: Reader,
    base: ReadableBase,
    sequences: Sequence[TrainingSequence],
    policy: str,
    initial: bool = False,
) -> torch.Tensor:
    """log p of every trained token [N] with this policy speaking, now or as the run began."""
    learner.load_weights(base.name)
    model = base.adapters.model
    layout: Layout = base.optimizers.layout
    with initial_weights(base.adapters, policy) if initial else base.adapters.active(policy):
        return forward_only(
            sequences,
            lambda batch: token_logprobs(model, batch)[0],
            learner.config.tokens_per_batch,
            layout,
            learner.ranks,
        )


def _sums(keys: Sequence[TurnKey], tokens: torch.Tensor) -> dict[TurnKey, float]:
    by_key: dict[TurnKey, list[float]] = {}
    for key, value in zip(keys, tokens.tolist(), strict=True):
        by_key.setdefault(key, []).append(value)
    return {key: math.fsum(values) for key, values in by_key.items()}
