"""Token log: the advantage of every trained turn, and the probability ratio of its tokens since
they were sampled.

`learned.jsonl` in the run folder has one line per turn and step, for people who read episodes and
not for training: `advantage` (a number, or one per token where they differ) and `ratio`, per token
the trainer's probability over the engine's at the step's last pass. A rank knows the ratios of the
rows it computed; those of other ranks are null.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...rollouts.files import append_text
from ..batching.samples import TrainingSequence
from ..update.losses.inputs import LossFn, LossInputs
from ..update.losses.statistics import Stats


class TokenLog:
    """Collects over the updates of a step; a turn that is trained again in the step is put down as
    it was last."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, int, int], dict[str, Any]] = {}

    def watch(
        self, samples: Sequence[TrainingSequence], loss_fn: LossFn
    ) -> tuple[LossFn, dict[str, torch.Tensor]]:
        """The same loss, which also notes every ratio; give what it notes to `add` after the
        update."""
        noted: dict[str, torch.Tensor] = {}
        for policy in {sample.policy for sample in samples}:
            noted[policy] = torch.full(
                (sum(s.num_trained for s in samples if s.policy == policy),), math.nan
            )

        def watched(inputs: LossInputs) -> tuple[torch.Tensor, Stats]:
            assert inputs.token_index is not None, "inputs of a batch have their token numbers"
            # on the device until all are there: a copy per batch would wait for each of them
            own = noted[inputs.policy] = noted[inputs.policy].to(inputs.logp.device)
            own[inputs.token_index] = (inputs.logp.detach() - inputs.behaviour).exp().float()
            return loss_fn(inputs)

        return watched, noted

    def add(self, samples: Sequence[TrainingSequence], noted: dict[str, torch.Tensor]) -> None:
        """Put down the turns of these samples."""
        start, ratios_of = dict.fromkeys(noted, 0), {p: own.tolist() for p, own in noted.items()}
        for sample in samples:
            ratios = ratios_of[sample.policy][
                start[sample.policy] : start[sample.policy] + sample.num_trained
            ]
            start[sample.policy] += sample.num_trained
            for turn, ids, advantages, own in turns_of(sample, ratios):
                flat = len(set(advantages)) == 1
                sampled = zlib.crc32(json.dumps(ids).encode())
                self.rows[sample.policy, sample.episode, turn, sampled] = {
                    "policy": sample.policy,
                    "episode": sample.episode,
                    "turn": turn,
                    "ids": sampled,
                    "advantage": short(advantages[0]) if flat else [short(a) for a in advantages],
                    "ratio": [short(r) for r in own],
                }

    def write(self, path: Path, step: int) -> None:
        """Append the step's turns and forget them."""
        if self.rows:
            append_text(
                path,
                "".join(json.dumps({"step": step, **row}) + "\n" for row in self.rows.values()),
            )
        self.rows = {}


def turns_of(
    sample: TrainingSequence, ratios: Sequence[float]
) -> Iterator[tuple[int, list[int], list[float], list[float]]]:
    """(turn index, its token ids, advantages, ratios) of every trained turn of a sample."""
    trained = [n for n, mask in enumerate(sample.mask) if mask]
    by_turn: dict[int, list[tuple[int, float]]] = {}
    for n, ratio in zip(trained, ratios, strict=True):
        by_turn.setdefault(sample.sequence[n], []).append((n, ratio))
    for turn, places in by_turn.items():
        yield (
            turn,
            [sample.ids[n] for n, _ in places],
            [sample.advantages[n] for n, _ in places],
            [r for _, r in places],
        )


def short(value: float) -> float | None:
    """Four digits, null for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
