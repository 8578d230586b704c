"""Negative log-likelihood: the loss of supervised fine-tuning and of weighted imitation."""

from __future__ import annotations

import torch

from .statistics import Stats


def weighted_nll(
    logp: torch.Tensor, weight: torch.Tensor, total: float
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of -sum(weight x log p) / total: SFT with weight 1 and total = the step's
    tokens (or its weights' sum)."""
    value = -(weight * logp).sum() / total
    counts = {
        "tokens": torch.tensor(float(logp.numel())),
        "nll": -logp.detach().sum(),
        "weight": weight.sum(),
        "loss": value.detach(),
    }
    return value, {key: item.double() for key, item in counts.items()}
