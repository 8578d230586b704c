"""Statistics of a loss: sums over trained tokens that add up over batches and ranks; the check for
values that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

Stats = dict[str, torch.Tensor]  # sums over terms by name, except `max_*`; see `add_stats`

# |log p - behaviour| is counted in 16 bins per decade from 1e-6 to 1e2; a quantile is read off to
# within 8 %.
_PER_DECADE, _LOWEST, _DECADES = 16, -6.0, 8
MAX_LOG_RATIO = 70.0  # exp of it is 2.5e30; float32 ends at 3.4e38


class NotFinite(RuntimeError):
    """A log-prob, loss or gradient is NaN or infinite. `policy` and `turns` (episode id, turn
    index) say where."""

    def __init__(self, what: str, policy: str, turns: Iterable[tuple[str, int]] = ()) -> None:
        self.policy, self.turns = policy, tuple(turns)
        where = ", ".join(f"episode {e} turn {t}" for e, t in self.turns[:5]) + (
            ", ..." if len(self.turns) > 5 else ""
        )
        super().__init__(
            f"{what} of policy {policy!r} is not finite{': ' + where if where else ''}; no step is"
            " made"
        )


def finite_or_raise(
    what: str, values: torch.Tensor | Iterable[torch.Tensor], policy: str, batch: Any = None
) -> None:
    """Raise `NotFinite` if any value is NaN or infinite. With a batch, a [N] tensor's bad terms are
    named by their turns."""
    tensors = [values] if isinstance(values, torch.Tensor) else list(values)
    for tensor in tensors:
        bad = ~torch.isfinite(tensor.detach())
        if bad.any():
            named = batch is not None and tensor.shape == batch.sequence.shape
            numbers = (
                sorted(set(batch.sequence[bad].tolist()))
                if named
                else range(len(batch.turns) if batch is not None else 0)
            )
            raise NotFinite(what, policy, [batch.turns[i] for i in numbers])


def ratio_of(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp, kept within what products of it and of advantages can hold in float32. Beyond that the
    gradient is that of the kept ratio, so that what clips or truncates it meets no infinity."""
    kept = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio - (log_ratio - kept).detach()).exp()


def mismatch_stats(
    logp: torch.Tensor, entropy: torch.Tensor, behaviour: torch.Tensor, sequence: torch.Tensor
) -> Stats:
    """Sums over the trained tokens of how trainer and engine differ; all arguments [N], without
    gradient. The k3 estimate is of KL(behaviour | trainer)."""
    difference = logp - behaviour
    size, ratio = difference.abs(), ratio_of(difference)
    bins = (
        torch.floor((size.clamp(min=1e-30).log10() - _LOWEST) * _PER_DECADE)
        .clamp(0, _PER_DECADE * _DECADES - 1)
        .long()
    )
    return {
        "tokens": logp.new_tensor(logp.numel()),
        "sequences": logp.new_tensor(sequence.unique().numel()),
        "entropy": entropy.sum(),
        "dlogp": size.sum(),
        "max_dlogp": size.max() if size.numel() else size.sum(),
        "dlogp_histogram": torch.bincount(bins, minlength=_PER_DECADE * _DECADES).double(),
        "mismatch_kl": (ratio - difference - 1).sum(),
        "ratio": ratio.sum(),
        "ratio_outside": ((ratio < 0.9) | (ratio > 1.1)).sum(),
    }


def add_stats(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> Stats:
    """Statistics of two batches together: all are sums, except `max_*`. Ranks are joined the same
    way."""
    joined = dict(a)
    for key, value in b.items():
        joined[key] = (
            value
            if key not in joined
            else (
                torch.maximum(joined[key], value) if key.startswith("max_") else joined[key] + value
            )
        )
    return joined


def summary(stats: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means over tokens, the maximum, and the 99th percentile of |dlogp| (upper edge of its bin),
    as plain numbers."""
    tokens = max(float(stats.get("tokens", 0.0)), 1.0)
    plain = {"loss": 1.0, "tokens": 1.0, "sequences": 1.0, "weight": 1.0, "max_dlogp": 1.0}
    means = {
        key: float(value) / plain.get(key, tokens)
        for key, value in stats.items()
        if key != "dlogp_histogram"
    }
    if "dlogp_histogram" in stats:
        below = torch.cumsum(stats["dlogp_histogram"], 0)
        place = int((below >= 0.99 * below[-1]).nonzero()[0]) if below[-1] > 0 else -1
        means["p99_dlogp"] = (
            min(10 ** (_LOWEST + (place + 1) / _PER_DECADE), means["max_dlogp"])
            if place >= 0
            else 0.0
        )
    return means
