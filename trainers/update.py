"""The optimizer step of a team: one AdamW per adapter, gradients summed over batches and ranks, nothing else moves.

A method hands over samples and a loss on flat terms; how the tokens are laid out is `batches.py`'s business, what is learnt is the
method's. The loss is divided by counts over all batches and ranks (per adapter), so packing, accumulation, the number of ranks and
the number of agents do not change its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .adapters import Adapters
from .batches import Batch, deal, pack
from .checkpoint import join_optimizer, split_optimizer
from .config import RunConfig
from .logprobs import choose_layout, token_logprobs
from .losses import Stats, add_stats, summary
from .ranks import Ranks
from .samples import Denominators, Sample, denominators

# (batch, logp [N], entropy [N], reference log-probs [N] or None, counts) -> (share of the loss, statistics for `losses.add_stats`)
LossFn = Callable[[Batch, torch.Tensor, torch.Tensor, torch.Tensor | None, Denominators], tuple[torch.Tensor, Stats]]


@dataclass
class Updated:
    """What one policy's update did. `stats`: `losses.summary` of its last pass; `first_mismatch_kl`: of its first, before
    any change; `moved`: mean |change| of trained log-probs, if measured."""

    stats: dict[str, float]
    first_mismatch_kl: float
    tokens: int
    sequences: int
    learning_rate: float
    grad_norm: float = 0.0
    applied: bool = True
    problem: str = ""
    moved: float | None = None


class Optimizers:
    """An AdamW per trainable policy of one base, over the parameters found by the policy's exact name."""

    def __init__(self, adapters: Adapters, config: RunConfig) -> None:
        self.adapters, self.config = adapters, config
        self.layout = choose_layout(adapters.model, config.layout)  # type: ignore[arg-type]
        self.peak = {name: adapters.policies[name].learning_rate or config.learning_rate for name in adapters.trainable}
        self.of = {
            name: torch.optim.AdamW(
                list(adapters.parameters(name).values()), lr=self.peak[name], weight_decay=config.weight_decay, foreach=False
            )
            for name in adapters.trainable
        }

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return split_optimizer(self.of[name].state_dict())

    def load(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        join_optimizer(self.of[name], tensors)


def update(
    optimizers: Optimizers,
    samples: Sequence[Sample],
    loss_fn: LossFn,
    step: int,
    ranks: Ranks,
    *,
    reference: bool = False,
    measure: bool = False,
) -> dict[str, Updated]:
    """Train every trainable policy that has samples, `num_iterations` times. Every rank passes the same samples.

    Args:
        reference: also give the loss the log-probs of the bare base (adapters off).
        measure: recompute the log-probs of the first batch afterwards, to tell how far the update moved them.
    """
    done: dict[str, Updated] = {}
    for name in optimizers.adapters.trainable:
        own = [sample for sample in samples if sample.policy == name]
        if own:
            done[name] = _update_policy(optimizers, name, own, loss_fn, step, ranks, reference, measure)
    return done


def _update_policy(
    optimizers: Optimizers,
    name: str,
    own: Sequence[Sample],
    loss_fn: LossFn,
    step: int,
    ranks: Ranks,
    reference: bool,
    measure: bool,
) -> Updated:
    adapters, config, optimizer = optimizers.adapters, optimizers.config, optimizers.of[name]
    counts = denominators(own)[name]
    batches = pack(own, max_tokens=config.tokens_per_batch, layout=optimizers.layout)
    mine = [batch.to(ranks.device) for batch in deal(batches, ranks.size)[ranks.rank]]
    parameters = list(adapters.parameters(name).values())
    rate = config.learning_rate_at(step, optimizers.peak[name])
    result = Updated({}, 0.0, int(counts.tokens), int(counts.sequences), rate)
    with adapters.active(name):
        before = _logprobs(adapters, mine[0]) if measure and mine else None
    references = [_reference(adapters, batch) if reference else None for batch in mine]
    for iteration in range(config.num_iterations):
        sums: Stats = {}
        optimizer.zero_grad(set_to_none=True)
        with adapters.active(name):
            for batch, ref in zip(mine, references, strict=True):
                logp, entropy = token_logprobs(adapters.model, batch)
                loss, stats = loss_fn(batch, logp, entropy, ref, counts)
                loss.backward()
                sums = add_stats(sums, stats)
        for parameter in parameters:  # a rank without samples of this policy joins with zeros
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.sum_([p.grad for p in parameters])  # type: ignore[misc]
        result.stats = _joined(sums, ranks)
        if iteration == 0:
            result.first_mismatch_kl = result.stats.get("mismatch_kl", 0.0)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(result.stats["loss"])):
            optimizer.zero_grad(set_to_none=True)
            result.applied, result.problem = False, f"loss {result.stats['loss']}, gradient norm {norm}"
            return result
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        result.grad_norm = norm
    optimizer.zero_grad(set_to_none=True)
    if before is not None:
        with adapters.active(name):
            result.moved = float((_logprobs(adapters, mine[0]) - before).abs().mean())
    return result


def _joined(sums: Stats, ranks: Ranks) -> dict[str, float]:
    """The statistics of all ranks, summarised; a rank without samples of the policy has none."""
    joined: Stats = {}
    for part in ranks.gather({key: value.tolist() for key, value in sums.items()}):
        joined = add_stats(joined, {key: torch.tensor(value, dtype=torch.float64) for key, value in part.items()})
    return summary(joined)


@torch.no_grad()
def _logprobs(adapters: Adapters, batch: Batch) -> torch.Tensor:
    return token_logprobs(adapters.model, batch)[0]


def _reference(adapters: Adapters, batch: Batch) -> torch.Tensor:
    with adapters.active("base"):
        return _logprobs(adapters, batch)


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain values: what is dumped when its loss is not a number."""
    return {name: getattr(sample, name) for name in sample.__dataclass_fields__}
