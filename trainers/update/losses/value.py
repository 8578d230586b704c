"""The loss of a critic (value head): clipped squared error."""

from __future__ import annotations

import torch

from ...batching.samples import Denominators
from .statistics import Stats


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    clip: float | None,
    total: Denominators,
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of a critic's loss: the mean over the step's tokens of max((V - R)^2, (V'
    - R)^2) / 2, all [N].

    V' is V kept within `clip` of the critic's value before the step's first update (None: not
    clipped): the critic's counterpart of the clipped ratio, and like it without gradient where it
    binds.
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(loss)
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        other = (bounded - returns) ** 2
        clipped = (other > loss).to(loss.dtype)
        loss = torch.maximum(loss, other)
    value = 0.5 * loss.sum() / total.tokens
    counts = {
        "tokens": values.new_tensor(values.numel()),
        "value_clipped": clipped.sum(),
        "loss": value.detach(),
    }
    return value, {key: item.detach().double() for key, item in counts.items()}
