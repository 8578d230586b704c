"""The policy-gradient loss, a pure function of flat terms (`LossInputs`).

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
from dataclasses import dataclass

import torch

from ....agents.settings import Settings, setting
from ....agents.types import SettingError
from ...batching.samples import Denominators
from .inputs import LossInputs
from .statistics import MAX_LOG_RATIO, Stats, mismatch_stats, ratio_of

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off")


@dataclass
class LossConfig(Settings):
    """Settings of the policy-gradient loss; names and defaults are TRL's where not said otherwise.

    loss_type: `dapo` sums over the step's tokens. `grpo`: mean of each turn, mean over turns.
    `dr_grpo`: over turns x `max_completion_length`. `luspo`: sum over each turn, mean over turns.
    `cispo`: REINFORCE with a capped constant ratio, over tokens. `bnpo`: as `dapo`, since TRL's
    local-batch mean would depend on packing.

    vllm_importance_sampling_mode: see the module's docstring; TRL's default is `sequence_mask`,
    which drops most long turns in bfloat16.
    """

    loss_type: str = setting(
        "how tokens are summed: dapo, grpo, bnpo, dr_grpo, luspo or cispo",
        "dapo",
        choices=LOSS_TYPES,
    )
    epsilon: float = setting(
        "the ratio is clipped to 1 - epsilon below, 1 + epsilon_high above", 0.2, at_least=0
    )
    epsilon_high: float | None = setting(
        "null means epsilon; for cispo the cap of the ratio itself (5.0 is recommended)",
        None,
        at_least=0,
    )
    delta: float | None = setting(
        "the ratio is never taken above this (two-sided clipping); null is off", None, above=0
    )
    beta: float = setting(
        "weight of the k3 KL to the reference: the policy as the run began, which is the base with"
        " adapters off unless it has an init",
        0.0,
        at_least=0,
    )
    use_bias_correction_kl: bool = setting(
        "KL times the ratio, which makes its gradient that of the reverse KL", True
    )
    importance_sampling_level: str = setting(
        "token, or sequence (GSPO: one ratio per turn, the geometric mean of its tokens')",
        "token",
        choices=("token", "sequence"),
    )
    vllm_importance_sampling_mode: str = setting(
        "correction of engine against trainer: token_truncate, token_mask, sequence_truncate,"
        " sequence_mask or off",
        "token_truncate",
        choices=CORRECTIONS,
    )
    vllm_importance_sampling_clip_max: float | None = setting(
        "upper bound of that correction; null is none", 3.0, above=0
    )
    vllm_importance_sampling_clip_min: float | None = setting(
        "lower bound of that correction; null is none", None, at_least=0
    )
    max_completion_length: int = setting("the constant of dr_grpo", 256, at_least=1)
    entropy_coef: float = setting(
        "weight of the mean token entropy that is subtracted from the loss", 0.0
    )
    normalize_by_calls: bool = setting(
        "divide a policy's terms by how often it was called in their episode, so that an episode"
        " with many calls weighs no more than one with few (Adam does not see a factor that all"
        " episodes have)",
        False,
    )

    def check(self) -> None:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise SettingError(
                "epsilon_high: cispo needs it; it is the cap of the ratio itself (5.0 is"
                " recommended)"
            )


def policy_loss(
    inputs: LossInputs, config: LossConfig, *, old_logp: torch.Tensor | None = None
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of the policy-gradient loss of one policy, and its statistics (see
    `summary`).

    Args:
        inputs: `reference` is needed if beta > 0, `entropy` with gradient if `entropy_coef` > 0.
        old_logp: [N] at the weights of the first pass; None means the behaviour's.
    """
    logp, reference = inputs.logp, inputs.reference
    if config.beta and reference is None:
        raise SettingError(
            "beta: > 0 needs LossInputs.reference, the log-probs of the policy as the run began;"
            " ask for it with UpdateOptions(reference=True)"
        )
    old = inputs.behaviour if old_logp is None else old_logp.detach()
    log_ratio = logp - old
    if config.importance_sampling_level == "sequence":
        log_ratio = _mean_by(log_ratio, inputs.sequence)
    ratio = ratio_of(log_ratio)
    inside = old_logp is None
    loss, used_ratio, stats = _surrogate(ratio, logp, inputs.advantage, config)
    weight, stats["corrected"] = _correction(
        used_ratio, log_ratio, logp.detach() if inside else old, inputs, config, inside=inside
    )
    loss = loss * weight
    if config.beta and reference is not None:
        distance = logp - reference.detach()
        kl = ratio_of(-distance) + distance - 1
        stats["kl"] = kl.detach().sum()
        if config.use_bias_correction_kl:
            cap = (
                config.vllm_importance_sampling_clip_max if inside else None
            )  # one garbage token must not rule the KL
            kl = kl * (ratio if cap is None else ratio.clamp(max=cap))
        loss = loss + config.beta * kl
    share = _share_of_calls(inputs, config)
    value = _reduce(loss * share, inputs.sequence, config, inputs.total)
    if config.entropy_coef:
        entropy = (inputs.entropy * share).sum()
        value = value - config.entropy_coef * entropy / inputs.total.tokens
    stats |= mismatch_stats(
        logp.detach(), inputs.entropy.detach(), inputs.behaviour, inputs.sequence
    )
    stats["loss"] = value.detach()
    return value, {
        key: item if key == "dlogp_histogram" else item.double() for key, item in stats.items()
    }


def _share_of_calls(inputs: LossInputs, config: LossConfig) -> torch.Tensor:
    """1 / calls of every term [N] with `normalize_by_calls`, else 1."""
    if not config.normalize_by_calls:
        return torch.ones_like(inputs.behaviour)
    if inputs.calls is None:
        raise SettingError(
            "normalize_by_calls: needs LossInputs.calls, how often the policy was called in each"
            " term's episode; `LossInputs.of` takes it from the batch"
        )
    return 1 / inputs.calls


def _surrogate(
    ratio: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor, config: LossConfig
) -> tuple[torch.Tensor, torch.Tensor, Stats]:
    """The loss of every term before correction [N], the ratio it contains [N], and how many terms
    were clipped.

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
    ratio: torch.Tensor,
    log_ratio: torch.Tensor,
    old: torch.Tensor,
    inputs: LossInputs,
    config: LossConfig,
    *,
    inside: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Constant [N] factor that corrects for engine against trainer, and how many terms its bounds
    changed.

    `inside`: the loss contains the ratio to the behaviour already, so the factor only applies the
    bounds to it.
    """
    mode = config.vllm_importance_sampling_mode
    if mode == "off":
        return torch.ones_like(old), torch.zeros((), device=old.device)
    cut = torch.zeros_like(old)  # what `ratio_of` took off the term's ratio
    if mode.startswith("sequence"):
        weight = _sum_by(old - inputs.behaviour, inputs.sequence)[inputs.sequence]
        if inside and config.loss_type != "cispo":
            cut = log_ratio.detach() - ratio.detach().log()
            cut = torch.where(log_ratio.detach().abs() > MAX_LOG_RATIO, cut, 0.0)
    else:
        weight = ratio.detach().log() if inside else old - inputs.behaviour
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
        unchanged = (bounded == weight).to(weight.dtype)
        return (unchanged if inside else unchanged * bounded.exp()), touched
    cut = torch.where(bounded != weight, cut, 0.0)
    return (bounded - weight + cut if inside else bounded).exp(), touched


def _reduce(
    loss: torch.Tensor, sequence: torch.Tensor, config: LossConfig, total: Denominators
) -> torch.Tensor:
    """Sum the terms [N] as `loss_type` says."""
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
