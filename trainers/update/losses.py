"""Losses as pure functions on flat terms: one entry per trained token, whatever rows it came from.

Formulas and names follow TRL's GRPOTrainer (GRPO arXiv:2402.03300, PPO clip 1707.06347, DAPO
2503.14476, Dr. GRPO 2503.20783, GSPO 2507.18071, CISPO 2506.13585). What differs, and why:

- Denominators are given: a policy's trained tokens and turns in the whole step. The loss of a batch
  is its share of the step's loss, so batches, ranks and accumulation are summed, never averaged,
  and no agent changes another's scale.
- There is no forward for "old" log-probs; the engine's are used. The ratio rho = exp(logp -
  behaviour) then holds both what the update changed and how engine and trainer differ, and clipping
  bounds both. Truncation acts on the same rho: where it leaves [clip_min, clip_max] the term's loss
  is multiplied by the constant clamp(rho)/rho (or by 0 in the `mask` modes), so its weight is
  min(rho, clip_max), which also bounds A < 0, where PPO's clip does not.
- With `old_logp` given (a second pass over the same episodes) it is TRL's product: rho = exp(logp -
  old_logp) is clipped, and the term is multiplied by w = exp(old_logp - behaviour), truncated or
  masked. If nothing is clipped or truncated, both agree.
- A "sequence" is one turn of one agent, so ratios and means per sequence stay those of one reply in
  long chats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch

from ...agents.types import SettingError
from ..batching.samples import Denominators

LossType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off"]
Stats = dict[str, torch.Tensor]

# |log p - behaviour| is counted in 16 bins per decade from 1e-6 to 1e2; a quantile is read off to
# within 8 %.
_PER_DECADE, _LOWEST, _DECADES = 16, -6.0, 8


@dataclass
class LossConfig:
    """Settings of the policy-gradient loss; names and defaults are TRL's where not said otherwise.

    Args:
        loss_type: how terms are summed. `dapo`: over the step's tokens. `grpo`: mean of each turn,
            mean over turns. `dr_grpo`:
            over turns x `max_completion_length`. `luspo`: sum over each turn, mean over turns.
                `cispo`: REINFORCE with a capped
            constant ratio, over tokens. `bnpo`: as `dapo`, since TRL's local-batch mean would
                depend on packing.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; epsilon_high
            None means epsilon. For `cispo` epsilon_high is the cap itself (5.0 is recommended).
        delta: the ratio is never taken above this (two-sided clipping); None is off.
        beta: weight of the k3 KL to the reference, which is the base with adapters off.
            use_bias_correction_kl: times the ratio, which makes its gradient that of the reverse
            KL.
        importance_sampling_level: `token`, or `sequence` (GSPO: one ratio per turn, the geometric
            mean of its tokens').
        vllm_importance_sampling_mode: see above; TRL's default is `sequence_mask`, which drops most
            long turns in bfloat16.
        vllm_importance_sampling_clip_max, _clip_min: its bounds; None is none.
        max_completion_length: the constant of `dr_grpo`.
        entropy_coef: weight of the mean token entropy that is subtracted from the loss.
    """

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    importance_sampling_level: Literal["token", "sequence"] = "token"
    vllm_importance_sampling_mode: Correction = "token_truncate"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    max_completion_length: int = 256
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("loss_type", self.loss_type, get_args(LossType)),
            ("importance_sampling_level", self.importance_sampling_level, ("token", "sequence")),
            (
                "vllm_importance_sampling_mode",
                self.vllm_importance_sampling_mode,
                get_args(Correction),
            ),
        ):
            if value not in known:
                raise SettingError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise SettingError(
                "epsilon_high: cispo needs it; it is the cap of the ratio itself (5.0 is"
                " recommended)"
            )
        if self.epsilon < 0 or self.beta < 0 or self.max_completion_length < 1:
            raise SettingError(
                "epsilon >= 0, beta >= 0 and max_completion_length >= 1 expected, "
                f"got {self.epsilon}, {self.beta} and {self.max_completion_length}"
            )


class Terms(Protocol):
    """What the losses read of a batch: behaviour [N], advantage [N], sequence [N] with numbers 0 ..
    S-1."""

    @property
    def behaviour(self) -> torch.Tensor: ...
    @property
    def advantage(self) -> torch.Tensor: ...
    @property
    def sequence(self) -> torch.Tensor: ...


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


def policy_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor,
    terms: Terms,
    config: LossConfig,
    total: Denominators,
    *,
    ref_logp: torch.Tensor | None = None,
    old_logp: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of the policy-gradient loss of one policy, and its statistics (see
    `summary`).

    Args:
        logp, entropy: [N] of the current weights; entropy needs a gradient only if `entropy_coef`
            is used.
        terms: see `Terms`; a `Batch` is one.
        total: trained tokens and turns of this policy in the whole step.
        ref_logp: [N] of the base with adapters off; needed if beta > 0.
        old_logp: [N] at the weights of the first pass; None means the behaviour's.
    """
    if config.beta and ref_logp is None:
        raise SettingError("beta: > 0 needs ref_logp, the log-probs of the base with adapters off")
    old = terms.behaviour if old_logp is None else old_logp.detach()
    log_ratio = logp - old
    if config.importance_sampling_level == "sequence":
        log_ratio = _mean_by(log_ratio, terms.sequence)
    ratio = log_ratio.exp()
    inside = old_logp is None
    loss, held, stats = _surrogate(ratio, logp, terms.advantage, config)
    weight, stats["corrected"] = _correction(
        held, logp.detach() if inside else old, terms, config, inside=inside
    )
    loss = loss * weight
    if config.beta and ref_logp is not None:
        distance = logp - ref_logp.detach()
        kl = torch.exp(-distance) + distance - 1
        stats["kl"] = kl.detach().sum()
        if config.use_bias_correction_kl:
            cap = (
                config.vllm_importance_sampling_clip_max if inside else None
            )  # one garbage token must not rule the KL
            kl = kl * (ratio if cap is None else ratio.clamp(max=cap))
        loss = loss + config.beta * kl
    value = _reduce(loss, terms.sequence, config, total)
    if config.entropy_coef:
        value = value - config.entropy_coef * entropy.sum() / total.tokens
    stats |= _monitor(logp.detach(), entropy.detach(), terms)
    stats["loss"] = value.detach()
    return value, {
        key: item if key == "dlogp_histogram" else item.double() for key, item in stats.items()
    }


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


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    clip: float | None,
    total: Denominators,
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of a critic's loss: the mean over the step's tokens of max((V - R)^2, (V'
    - R)^2) / 2, all [N].

    V' is V held within `clip` of what the critic said before the step's first update (None: not
    held): the critic's counterpart of the clipped ratio, and like it without gradient where it
    binds.
    """
    loss = (values - returns) ** 2
    clipped = torch.zeros_like(loss)
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        other = (held - returns) ** 2
        clipped = (other > loss).to(loss.dtype)
        loss = torch.maximum(loss, other)
    value = 0.5 * loss.sum() / total.tokens
    counts = {
        "tokens": values.new_tensor(values.numel()),
        "value_clipped": clipped.sum(),
        "loss": value.detach(),
    }
    return value, {key: item.detach().double() for key, item in counts.items()}


def _surrogate(
    ratio: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    """The loss of every term before correction, the ratio it holds, and how many terms were
    clipped.

    Clipped terms have no gradient, except for cispo, where the ratio is a constant.
    """
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo":
        capped, clipped = ratio.clamp(max=high).detach(), (ratio > high) & (advantage > 0)
        return (
            -capped * advantage * logp,
            capped,
            {"clip_low": torch.zeros_like(clipped.sum()), "clip_high": clipped.sum()},
        )
    bounded = ratio.clamp(1 - config.epsilon, 1 + high)
    free = ratio if config.delta is None else ratio.clamp(max=config.delta)
    loss = -torch.min(free * advantage, bounded * advantage)
    low_, high_ = (
        (ratio < 1 - config.epsilon) & (advantage < 0),
        (ratio > 1 + high) & (advantage > 0),
    )
    return loss, ratio, {"clip_low": low_.sum(), "clip_high": high_.sum()}


def _correction(
    ratio: torch.Tensor, old: torch.Tensor, terms: Terms, config: LossConfig, *, inside: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant [N] factor for engine against trainer, and how many terms its bounds touched.

    `inside`: the loss holds the ratio to the behaviour already, so the factor only applies the
    bounds to it.
    """
    mode = config.vllm_importance_sampling_mode
    if mode == "off":
        return torch.ones_like(old), torch.zeros((), device=old.device)
    if mode.startswith("sequence"):
        weight = _sum_by(old - terms.behaviour, terms.sequence)[terms.sequence]
    else:
        weight = ratio.detach().log() if inside else old - terms.behaviour
    low = (
        -math.inf
        if not config.vllm_importance_sampling_clip_min
        else math.log(config.vllm_importance_sampling_clip_min)
    )
    high = (
        math.inf
        if config.vllm_importance_sampling_clip_max is None
        else math.log(config.vllm_importance_sampling_clip_max)
    )
    bounded = weight.clamp(
        low, high
    )  # all in logs: the product over a long turn leaves the range of float32
    touched = (bounded != weight).sum()
    if mode.endswith("mask"):
        kept = (bounded == weight).to(weight.dtype)
        return (kept if inside else kept * bounded.exp()), touched
    return (bounded - weight if inside else bounded).exp(), touched


def _reduce(
    loss: torch.Tensor, sequence: torch.Tensor, config: LossConfig, total: Denominators
) -> torch.Tensor:
    if config.loss_type == "grpo":
        return _mean_by(loss, sequence, spread=False).sum() / total.sequences
    if config.loss_type == "luspo":
        return loss.sum() / total.sequences
    if config.loss_type == "dr_grpo":
        return loss.sum() / (total.sequences * config.max_completion_length)
    return loss.sum() / total.tokens


def _sum_by(values: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    count = int(sequence.max()) + 1 if sequence.numel() else 0
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(
        0, sequence, values
    )


def _mean_by(values: torch.Tensor, sequence: torch.Tensor, *, spread: bool = True) -> torch.Tensor:
    """Mean over each sequence [S], or spread back over its terms [N]."""
    means = _sum_by(values, sequence) / _sum_by(torch.ones_like(values), sequence).clamp(min=1)
    return means[sequence] if spread else means


def _monitor(logp: torch.Tensor, entropy: torch.Tensor, terms: Terms) -> Stats:
    """Sums over terms of how trainer and behaviour differ. The k3 estimate is of KL(behaviour |
    trainer)."""
    difference = logp - terms.behaviour
    size, ratio = difference.abs(), difference.exp()
    bins = (
        torch.floor((size.clamp(min=1e-30).log10() - _LOWEST) * _PER_DECADE)
        .clamp(0, _PER_DECADE * _DECADES - 1)
        .long()
    )
    return {
        "tokens": logp.new_tensor(logp.numel()),
        "sequences": logp.new_tensor(terms.sequence.unique().numel()),
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
    found = {
        key: float(value) / plain.get(key, tokens)
        for key, value in stats.items()
        if key != "dlogp_histogram"
    }
    if "dlogp_histogram" in stats:
        below = torch.cumsum(stats["dlogp_histogram"], 0)
        place = int((below >= 0.99 * below[-1]).nonzero()[0]) if below[-1] > 0 else -1
        found["p99_dlogp"] = (
            min(10 ** (_LOWEST + (place + 1) / _PER_DECADE), found["max_dlogp"])
            if place >= 0
            else 0.0
        )
    return found
