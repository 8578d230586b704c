"""Probes of weight verification: sampled turns on whose tokens engine and trainer are compared, and
the trainer's log-probs of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...agents.types import BASE
from ...rollouts.types import Episode
from ..batching.batches import pack
from ..batching.samples import TrainingSequence
from ..model.adapters import Adapters
from ..model.layouts import chosen_layout
from ..model.logprobs import token_logprobs

PROBES = 3  # turns that are compared
REPLY = CONTEXT = 24  # their tokens that are: of the turn, and before it
# of these, behind a cut, are not: they follow out of nothing, and bfloat16 can be off by whole nats
# there
SURPRISED = 4
MAX_TOKENS = 8192  # of a forward pass of the trainer's


@dataclass(frozen=True)
class ScoredWindow:
    """Tokens of which those from `first` >= 1 on are scored, at `temperature`, each given those
    before it."""

    ids: tuple[int, ...]
    first: int = 1
    temperature: float = 1.0


@dataclass(frozen=True)
class Probe:
    """A turn of the policy: `ids` [P + T], of which those from `prompt` = P on were sampled, at
    `temperature`."""

    ids: tuple[int, ...]
    prompt: int
    temperature: float = 1.0

    @property
    def window(self) -> ScoredWindow:
        """The turn's begin and what stands just before it, as a sequence of its own: next to
        nothing is computed that is not compared, however long the prompt. Behind the prompt's first
        token, without which many a model is out of its senses.
        """
        start = max(0, self.prompt - CONTEXT)
        if start < 2:
            return ScoredWindow(self.ids)
        return ScoredWindow((self.ids[0], *self.ids[start:]), first=1 + SURPRISED)


def probes(episodes: Iterable[Episode], policy: str, count: int = PROBES) -> list[Probe]:
    """Up to `count` turns sampled by the policy, of different tasks first, then those with the
    shortest prompts; replies are cut."""
    turns = [
        (e.task.id, t)
        for e in episodes
        for t in e.turns
        if t.policy == policy and t.source == "sampled" and t.token_ids
    ]
    turns.sort(key=lambda item: len(item[1].prompt_ids))
    seen: Counter[str] = Counter()
    ranked = []
    for task, turn in turns:
        ranked.append((seen[task], turn))
        seen[task] += 1
    chosen = [turn for _, turn in sorted(ranked, key=lambda item: item[0])[:count]]
    return [
        Probe(
            t.prompt_ids + t.token_ids[:REPLY],
            len(t.prompt_ids),
            t.sampling.temperature if t.sampling.on_policy else 1.0,
        )
        for t in chosen
    ]


@torch.no_grad()
def trainer_logprobs(
    adapters: Adapters, asked: Sequence[ScoredWindow], policy: str, factor: float = 1.0
) -> list[float]:
    """The trainer's log-probs of the scored tokens, one after another.

    Policy `base` is the bare base; the adapter's scaling is taken times `factor`. Rows are laid out
    as the update lays them out, so that an error of theirs shows too.
    """
    layout = chosen_layout(adapters.model)
    samples = [_sample(str(number), one) for number, one in enumerate(asked)]
    values = torch.zeros(sum(sample.num_trained for sample in samples))
    with adapters.active(policy), adapters.amplified(policy, factor):
        for batch in pack(samples, max_tokens=MAX_TOKENS, layout=layout):
            logps = token_logprobs(adapters.model, batch.to(adapters.device))[0]
            values[batch.token_index] = logps.cpu()
    return values.tolist()


def _sample(name: str, asked: ScoredWindow) -> TrainingSequence:
    """The sequence as a sample, whose trained tokens are those that are scored."""
    before, rest = asked.first, len(asked.ids) - asked.first
    zeros = (0.0,) * len(asked.ids)
    temperatures = (1.0,) * before + (asked.temperature,) * rest
    return TrainingSequence(
        BASE,
        name,
        asked.ids,
        (0,) * before + (1,) * rest,
        zeros,
        zeros,
        temperatures,
        (-1,) * before + (0,) * rest,
    )
