"""`LossInputs`, the flat per-token tensors that a loss reads (log-probs now, at sampling and of the
reference; advantages; entropy), and `LossFn`, its signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...batching.batches import Batch
from ...batching.samples import Denominators
from .statistics import Stats


@dataclass(frozen=True)
class LossInputs:
    """A batch as a loss reads it: flat terms, one per trained token, whatever rows they came from.

    N = trained tokens of this batch, S = its turns; tensors are on the batch's device.

    logp: [N] log-probs under the current weights.
    entropy: [N] of the current weights; has a gradient only with `UpdateOptions.entropy_grad`.
    behaviour: [N] log-probs when sampled, the engine's.
    advantage: [N] the number of the term's turn (imitation and preferences: its weight).
    sequence: [N] number 0 .. S-1 of the term's turn.
    total: trained tokens and turns of this policy in the whole step. A loss is divided by these and
        never by the batch's, so batches, ranks and accumulation are summed.
    reference: [N] log-probs of the policy as the run began, with `UpdateOptions.reference`.
    policy: the policy that learns.
    token_index: [N] the term's number among all trained tokens of the step's sequences of this
        policy: indexes numbers that a method keeps per trained token.
    calls: [N] how often the policy was called in the term's episode, whoever spoke as it.
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    behaviour: torch.Tensor
    advantage: torch.Tensor
    sequence: torch.Tensor
    total: Denominators
    reference: torch.Tensor | None = None
    policy: str = ""
    token_index: torch.Tensor | None = None
    calls: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        batch: Batch,
        logp: torch.Tensor,
        entropy: torch.Tensor,
        total: Denominators,
        reference: torch.Tensor | None = None,
    ) -> LossInputs:
        """The terms of a batch with what the model computed for them."""
        return cls(
            logp,
            entropy,
            batch.behaviour,
            batch.advantage,
            batch.sequence,
            total,
            reference,
            batch.policy,
            batch.token_index,
            batch.calls,
        )


# this batch's share of the step's loss, and its statistics
LossFn = Callable[[LossInputs], tuple[torch.Tensor, Stats]]
