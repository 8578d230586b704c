"""Scalar heads (value head, reward head): a LoRA of its own on the shared frozen base, and a
linear layer that reads one number off a token's last hidden state.

A critic's value of every token and a verifier's score of an answer are the same kind of number, so
both stand here. A head is no policy: its adapter is called `head@NAME`, which no policy can be,
nothing publishes it, and it counts in no team version. Like a policy it is created before any
optimizer, seeded by its name, found by exact name, and leaves the base as it was.

    head = ScalarHead(adapters, HeadSpec("critic"), config)
    # [N]: one number per trained token, in the order of samples
    values = head.read(samples, ranks)
    # one optimizer step on a loss of (scores, targets)
    head.learn(samples, {"returns": returns}, loss, step, ranks)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from ...agents.types import AdapterSpec, SettingError
from ..batching.batches import Batch, Layout
from ..batching.samples import Denominators, TrainingSequence
from ..checkpoint import join_optimizer, split_optimizer, write_tensors
from ..distributed.ranks import Ranks
from ..model.adapter_files import tensors_sha256
from ..model.adapters import Adapters
from ..model.layouts import choose_layout
from ..model.logprobs import guarded, last_hidden
from .losses.statistics import Stats
from .optimizer_step import UpdateResult, accumulate, batches_of, forward_only, optimizer_step

LINEAR = "head.safetensors"
Targets = Mapping[str, torch.Tensor]  # by name: [N], one number per trained token
# (scores, targets, counts) -> (this batch's share of the loss, statistics for
# `losses.statistics.add_stats`)
HeadLoss = Callable[[torch.Tensor, Targets, Denominators], tuple[torch.Tensor, Stats]]


class HeadSettings(Protocol):
    """The settings that a head reads; `RunConfig` has them."""

    seed: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    tokens_per_batch: int
    layout: str

    def learning_rate_at(self, step: int, peak: float) -> float: ...


@dataclass(frozen=True)
class HeadSpec:
    """Name, base and LoRA of a head.

    name: unique among heads; letters, digits, '_' and '-' (it names a folder).
    base, learning_rate: None means the run's.
    adapter: shape of its LoRA.
    """

    name: str
    base: str | None = None
    adapter: AdapterSpec = AdapterSpec()
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise SettingError(
                f"head name {self.name!r}: letters, digits, '_' and '-' expected (it names a"
                " folder)"
            )


class ScalarHead:
    """One scalar per token: w . h + b in float32, with h the last hidden state of the base with the
    head's LoRA on.

    w and b begin at 0, so that an untrained head says 0 of everything. Policies on the same
    `adapters` are not touched, whatever it learns.

    Args:
        layout: how its batches are laid out, if that is known already; None tries `config.layout`
            on the model.
    """

    def __init__(
        self, adapters: Adapters, spec: HeadSpec, config: HeadSettings, layout: Layout | None = None
    ) -> None:
        self.adapters, self.spec, self.config = adapters, spec, config
        self.adapter = f"head@{spec.name}"
        adapters.add(self.adapter, spec.adapter)
        width = adapters.model.get_input_embeddings().weight.shape[1]
        self.linear = nn.Linear(width, 1, device=adapters.device, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.layout = layout or choose_layout(adapters.model, config.layout)
        self.peak = config.learning_rate if spec.learning_rate is None else spec.learning_rate
        self.optimizer = torch.optim.AdamW(
            list(self.parameters().values()),
            lr=self.peak,
            weight_decay=config.weight_decay,
            foreach=False,
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        """LoRA tensors by the key they have in a saved file, then `weight` [1, H] and `bias` [1] of
        the linear layer."""
        return {**self.adapters.parameters(self.adapter), **dict(self.linear.named_parameters())}

    def sha256(self) -> str:
        """Hash of LoRA and linear layer."""
        return tensors_sha256(self.parameters().items())

    def check(self) -> None:
        """Raise RuntimeError unless its optimizer holds exactly its tensors, and the table of
        gradients is as declared."""
        self.adapters.check()
        optimized = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        if optimized != [id(p) for p in self.parameters().values()]:
            raise RuntimeError(
                f"the optimizer of head {self.spec.name!r} does not hold exactly the tensors of"
                " that head"
            )

    def scores(self, batch: Batch) -> torch.Tensor:
        """[N] float32, one per term, read where the term is predicted: before the token is seen.
        With `after`, once it is.

        Backward has to run while the head's adapter is still active, see `Adapters.active`.
        """
        hidden = last_hidden(self.adapters.model, batch, batch.row, batch.column)
        return guarded(self.adapters.model, self.linear(hidden.float()).squeeze(-1))

    def read(self, samples: Sequence[TrainingSequence], ranks: Ranks) -> torch.Tensor:
        """What the head says at every trained token of these samples, in their order: float32 on
        the CPU, equal on every rank."""
        with self.adapters.active(self.adapter):
            return forward_only(
                self._own(samples), self.scores, self.config.tokens_per_batch, self.layout, ranks
            )

    def learn(
        self,
        samples: Sequence[TrainingSequence],
        targets: Targets,
        loss_fn: HeadLoss,
        step: int,
        ranks: Ranks,
    ) -> UpdateResult:
        """One optimizer step on a loss of the scores at all trained tokens. Every rank passes the
        same samples and targets.

        `targets` are in the order of `read`; the loss gets a batch's share of them. `step` sets the
        learning rate (`learning_rate_at`). On a loss or gradient that is not finite no step is
        made; `UpdateResult.problem` then names it.
        """
        self.check()
        counts = Denominators(
            sum(s.num_trained for s in samples), sum(len(set(s.sequence) - {-1}) for s in samples)
        )
        given = {name: numbers.to(ranks.device, torch.float32) for name, numbers in targets.items()}
        rate = self.config.learning_rate_at(step, self.peak)
        result = UpdateResult({}, 0.0, int(counts.tokens), int(counts.sequences), rate)
        mine = batches_of(self._own(samples), self.config.tokens_per_batch, self.layout, ranks)
        optimizer_step(
            self.optimizer,
            lambda: self._backward(mine, given, loss_fn, counts),
            result,
            ranks,
            self.config.max_grad_norm,
        )
        self.check()
        return result

    def _own(self, samples: Sequence[TrainingSequence]) -> list[TrainingSequence]:
        """One batch holds samples of one policy: to a head, they are all its own."""
        return [replace(sample, policy=self.adapter) for sample in samples]

    def _backward(
        self, batches: Sequence[Batch], targets: Targets, loss_fn: HeadLoss, counts: Denominators
    ) -> tuple[Stats, str]:
        with self.adapters.active(self.adapter):
            return accumulate(
                self.adapter,
                "score",
                batches,
                lambda batch: (self.scores(batch),),
                lambda _, batch, scores: loss_fn(
                    scores, {name: t[batch.token_index] for name, t in targets.items()}, counts
                ),
            )

    def save(self, folder: str | Path) -> Path:
        """Write a plain PEFT folder, with the linear layer beside it in `head.safetensors`."""
        path = self.adapters.save(self.adapter, folder)
        write_tensors(
            path / LINEAR,
            {name: p.detach().cpu().contiguous() for name, p in self.linear.named_parameters()},
        )
        return path

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote. Raises `SettingError` where something is missing or does not
        fit."""
        path = Path(folder) / LINEAR
        if not path.is_file():
            raise SettingError(
                f"head {self.spec.name!r}: no {path}; expected the folder of a saved head"
            )
        tensors, mine = load_file(path), dict(self.linear.named_parameters())
        shapes, expected = (
            {name: tuple(t.shape) for name, t in given.items()} for given in (tensors, mine)
        )
        if shapes != expected or not all(t.isfinite().all() for t in tensors.values()):
            raise SettingError(
                f"head {self.spec.name!r}: {path} holds {shapes}, or numbers that are not finite;"
                f" expected finite {expected}"
            )
        self.adapters.load(self.adapter, folder)
        with torch.no_grad():
            for name, tensor in tensors.items():
                mine[name].copy_(tensor)

    def state(self) -> dict[str, torch.Tensor]:
        """Its optimizer's moments as named tensors; `load_state` puts them back."""
        return split_optimizer(self.optimizer.state_dict())

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        join_optimizer(self.optimizer, tensors)


def after(sample: TrainingSequence) -> TrainingSequence:
    """The sample with its terms one position later: a head then reads the hidden states of the
    trained tokens themselves.

    Only for heads: the tokens to predict, log-probs and advantages are no longer those of the
    sample.
    """
    end = max(i for i, trained in enumerate(sample.mask) if trained) + 1
    columns: dict[str, Any] = {
        name: (rest, *getattr(sample, name)[:end])
        for name, rest in (
            ("mask", 0),
            ("logprobs", 0.0),
            ("advantages", 0.0),
            ("temperatures", 1.0),
            ("sequence", -1),
        )
    }
    return replace(sample, ids=(*sample.ids[:end], sample.ids[end - 1]), **columns)
