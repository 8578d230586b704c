"""The optimizer step of a team: one AdamW per adapter, gradients summed over batches and ranks,
nothing else moves.

A method gives samples and a loss on flat terms (`LossInputs`); `batching/batches.py` lays the
tokens out. The loss is divided by counts over all batches and ranks
(per adapter), so packing, accumulation, the number of ranks and the number of agents do not change
its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..batching.batches import Batch, Layout, pack, pad_ranks, split_over_ranks
from ..batching.samples import Denominators, TrainingSequence, denominators
from ..checkpoint import join_optimizer, split_optimizer
from ..config import OptimizerSettings
from ..distributed.ranks import Ranks
from ..model.adapters import Adapters
from ..model.layouts import choose_layout
from ..model.logprobs import token_logprobs
from .initial_policy import initial_weights
from .losses.inputs import LossFn, LossInputs
from .losses.statistics import NotFinite, Stats, add_stats, finite_or_raise, summary


@dataclass
class UpdateResult:
    """What one policy's update did. `stats`: `statistics.summary` of its last pass;
    `first_mismatch_kl`: of its first, before any change; `moved`: mean |change| of trained
    log-probs, if measured."""

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
    """An AdamW per trainable policy of one base, over the parameters found by the policy's exact
    name."""

    def __init__(self, adapters: Adapters, config: OptimizerSettings) -> None:
        self.adapters, self.config = adapters, config
        # on a base without weights nothing is computed
        self.layout: Layout = (
            "padded" if adapters.weightless else choose_layout(adapters.model, config.layout)
        )
        self.peak = {
            name: config.learning_rate if spec.learning_rate is None else spec.learning_rate
            for name, spec in adapters.policies.items()
            if spec.trainable
        }
        self.of = {
            name: torch.optim.AdamW(
                list(adapters.parameters(name).values()),
                lr=self.peak[name],
                weight_decay=config.weight_decay,
                foreach=False,
            )
            for name in adapters.trainable
        }

    def check(self) -> None:
        """Raise RuntimeError unless every optimizer holds exactly its policy's tensors, and the
        table of gradients is as declared."""
        self.adapters.check()
        for name, optimizer in self.of.items():
            optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
            if sorted(optimized) != sorted(map(id, self.adapters.parameters(name).values())):
                raise RuntimeError(
                    f"the optimizer of policy {name!r} does not hold exactly the tensors of its"
                    " adapter"
                )

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return split_optimizer(self.of[name].state_dict())

    def load(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        join_optimizer(self.of[name], tensors)


@dataclass(frozen=True)
class UpdateOptions:
    """How a method's loss is fed: `reference` adds log-probs of the policy as the run began,
    `entropy_grad` lets gradients through the entropy, `measure` recomputes the first batch
    afterwards, to tell how far the update moved it. `totals`: by policy what a loss is divided by;
    None takes the tokens and turns that are trained."""

    reference: bool = False
    entropy_grad: bool = False
    measure: bool = False
    totals: Mapping[str, Denominators] | None = None


def update(
    optimizers: Optimizers,
    samples: Sequence[TrainingSequence],
    loss_fn: LossFn,
    step: int,
    ranks: Ranks,
    how: UpdateOptions = UpdateOptions(),
) -> dict[str, UpdateResult]:
    """Train every trainable policy that has samples, `num_iterations` times. Every rank passes the
    same samples."""
    done: dict[str, UpdateResult] = {}
    optimizers.check()
    for name in optimizers.adapters.trainable:
        own = [sample for sample in samples if sample.policy == name]
        if own:
            done[name] = _update_policy(optimizers, name, own, loss_fn, step, ranks, how)
    optimizers.check()
    return done


def _update_policy(
    optimizers: Optimizers,
    name: str,
    own: Sequence[TrainingSequence],
    loss_fn: LossFn,
    step: int,
    ranks: Ranks,
    how: UpdateOptions,
) -> UpdateResult:
    adapters, config, optimizer = optimizers.adapters, optimizers.config, optimizers.of[name]
    trained = denominators(own)[name]
    counts = trained if how.totals is None else how.totals[name]
    mine = batches_of(own, config.tokens_per_batch, optimizers.layout, ranks)
    result = UpdateResult(
        {},
        0.0,
        int(trained.tokens),
        int(trained.sequences),
        config.learning_rate_at(step, optimizers.peak[name]),
    )
    before = _logprobs(adapters, name, mine[0]) if how.measure and mine else None
    references: list[torch.Tensor | None] = [None] * len(mine)
    if how.reference:
        with initial_weights(adapters, name), torch.no_grad():
            references = [token_logprobs(adapters.model, batch)[0] for batch in mine]
    for iteration in range(config.num_iterations):
        optimizer_step(
            optimizer,
            lambda: _backward(adapters, name, mine, references, loss_fn, counts, how),
            result,
            ranks,
            config.max_grad_norm,
        )
        if iteration == 0:
            result.first_mismatch_kl = result.stats.get("mismatch_kl", 0.0)
        if not result.applied:
            return result
    if before is not None:
        result.moved = float((_logprobs(adapters, name, mine[0]) - before).abs().mean())
    return result


def batches_of(
    samples: Sequence[TrainingSequence], max_tokens: int, layout: Layout, ranks: Ranks
) -> list[Batch]:
    """This rank's share of the batches of these samples, on its device."""
    dealt = split_over_ranks(
        pack(samples, max_tokens=max_tokens, layout=layout, parts=ranks.size), ranks.size
    )
    return [
        batch.to(ranks.device)
        for batch in (pad_ranks(dealt) if ranks.lockstep else dealt)[ranks.rank]
    ]


@torch.no_grad()
def forward_only(
    samples: Sequence[TrainingSequence],
    score: Callable[[Batch], torch.Tensor],
    max_tokens: int,
    layout: Layout,
    ranks: Ranks,
) -> torch.Tensor:
    """What `score` says of every trained token of these samples, in their order: float32 on the
    CPU, equal on every rank."""
    per_token = torch.zeros(sum(sample.num_trained for sample in samples), device=ranks.device)
    for batch in batches_of(samples, max_tokens, layout, ranks):
        scores = score(batch)
        if not batch.is_padding:
            per_token[batch.token_index] = scores
    ranks.sum_([per_token])  # every token was filled by one rank and is 0 on the others
    return per_token.cpu()


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], tuple[Stats, str]],
    result: UpdateResult,
    ranks: Ranks,
    max_grad_norm: float,
) -> None:
    """One step at `result.learning_rate` along the gradients that `backward` leaves on every rank,
    summed; what it did goes into `result`. `max_grad_norm` 0 does not clip.

    `backward` returns its statistics and what was not finite ("" if all was). Then, on any rank,
    there is no step on any.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    sums, problem = backward()
    for parameter in parameters:  # a rank without samples joins with zeros
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    problem = next(filter(None, ranks.gather(problem)), "")
    ranks.sum_([p.grad for p in parameters])
    result.stats = _joined(sums, ranks)
    bound = max_grad_norm if max_grad_norm > 0 else math.inf
    result.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
    if problem or not math.isfinite(result.grad_norm):
        result.applied, result.problem = False, problem or f"gradient norm {result.grad_norm}"
    else:
        for group in optimizer.param_groups:
            group["lr"] = result.learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _backward(
    adapters: Adapters,
    name: str,
    batches: Sequence[Batch],
    references: Sequence[torch.Tensor | None],
    loss_fn: LossFn,
    counts: Denominators,
    how: UpdateOptions,
) -> tuple[Stats, str]:
    """Gradients of this rank's batches, their statistics, and what was not finite ("" if all was):
    see `accumulate`."""
    with adapters.active(name):
        return accumulate(
            name,
            "log-prob",
            batches,
            lambda batch: token_logprobs(adapters.model, batch, entropy_grad=how.entropy_grad),
            lambda number, batch, logp, entropy: loss_fn(
                LossInputs.of(batch, logp, entropy, counts, references[number])
            ),
        )


def accumulate(
    name: str,
    what: str,
    batches: Sequence[Batch],
    score: Callable[[Batch], tuple[torch.Tensor, ...]],
    loss_of: Callable[..., tuple[torch.Tensor, Stats]],
) -> tuple[Stats, str]:
    """Let every batch's loss leave its gradients: statistics of all, and the first thing that was
    not finite ("" if all was).

    `score`: what the model says of a batch; the first of it, `what`, is checked. `loss_of(number of
    the batch, batch, *score)`: loss and statistics. Nothing is raised and no batch left out, for
    other ranks go on and may wait for this one in every pass.
    """
    sums: Stats = {}
    problem = ""
    for number, batch in enumerate(batches):
        scores = score(batch)
        try:
            finite_or_raise(what, scores[0], name, batch)
            loss, stats = loss_of(number, batch, *scores)
            finite_or_raise("loss", loss, name, batch)
        except NotFinite as error:
            problem = problem or str(error)
            loss, stats = scores[0].sum(), {}
        if batch.is_padding:
            loss, stats = 0 * loss, {}
        loss.backward()
        sums = add_stats(sums, stats)
    return sums, problem


def _joined(sums: Stats, ranks: Ranks) -> dict[str, float]:
    """The statistics of all ranks, summarised; a rank without samples of the policy has none."""
    joined: Stats = {}
    for part in ranks.gather({key: value.tolist() for key, value in sums.items()}):
        joined = add_stats(
            joined, {key: torch.tensor(value, dtype=torch.float64) for key, value in part.items()}
        )
    return summary(joined)


@torch.no_grad()
def _logprobs(adapters: Adapters, policy: str, batch: Batch) -> torch.Tensor:
    with adapters.active(policy):
        return token_logprobs(adapters.model, batch)[0]


def sample_to_json(sample: TrainingSequence) -> dict[str, Any]:
    """A sample as plain values: what is dumped when its loss is not a number."""
    return {name: getattr(sample, name) for name in sample.__dataclass_fields__}
