"""Turns just trained, on whose tokens engine and trainer are compared by the live proof; and what the trainer says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..agents.types import BASE
from ..rollouts.types import Episode
from .adapters import Adapters
from .batches import Layout, pack
from .layouts import way_of
from .logprobs import token_logprobs
from .samples import Sample

PROBES = 8  # turns that are compared
REPLY = CONTEXT = 64  # their tokens that are: of the turn, and before it
MAX_TOKENS = 8192  # of a forward pass of the trainer's


@dataclass(frozen=True)
class Probe:
    """A turn of the policy: `ids` [P + T], of which those from `prompt` = P on were sampled, at `temperature`."""

    ids: tuple[int, ...]
    prompt: int
    temperature: float = 1.0

    @property
    def first(self) -> int:
        """The first token that is compared when the probe is scored."""
        return max(1, self.prompt - CONTEXT)


def probes(episodes: Iterable[Episode], agents_of: Mapping[str, Sequence[str]], policy: str, count: int = PROBES) -> list[Probe]:
    """Up to `count` sampled turns of the policy, of different tasks first, then those with the shortest prompts; replies are cut."""
    turns = [
        (e.task.id, t) for e in episodes for t in e.turns if t.agent in agents_of[policy] and t.source == "sampled" and t.token_ids
    ]
    turns.sort(key=lambda item: len(item[1].prompt_ids))
    seen: Counter[str] = Counter()
    ranked = []
    for task, turn in turns:
        ranked.append((seen[task], turn))
        seen[task] += 1
    chosen = [turn for _, turn in sorted(ranked, key=lambda item: item[0])[:count]]
    return [
        Probe(t.prompt_ids + t.token_ids[:REPLY], len(t.prompt_ids), t.sampling.temperature if t.sampling.on_policy else 1.0)
        for t in chosen
    ]


@torch.no_grad()
def trainer_logprobs(
    adapters: Adapters, found: Sequence[Probe], policy: str | None, factor: float = 1.0, sampled: bool = False
) -> list[float]:
    """The trainer's log-probs of the probes' tokens, one after another: at temperature 1, as engines score; or of their sampled tokens
    only, at the temperature of the draw.

    policy None is the bare base; the adapter's scaling is taken times `factor`. What probes begin with in common is computed once, where
    the model's attention can do that.
    """
    layout: Layout = "shared" if way_of(adapters.model) in ("flex", "branches") else "padded"
    asked = [_asked(str(number), probe, sampled) for number, probe in enumerate(found)]
    values = torch.zeros(sum(sample.num_trained for sample in asked))
    with adapters.active(policy or BASE), adapters.amplified(policy or BASE, factor):
        for batch in pack(asked, max_tokens=MAX_TOKENS, layout=layout):
            values[batch.place] = token_logprobs(adapters.model, batch.to(adapters.device))[0].cpu()
    return values.tolist()


def _asked(name: str, probe: Probe, sampled: bool) -> Sample:
    """The probe as a sample, whose tokens are those that are compared."""
    first, size = probe.prompt if sampled else probe.first, len(probe.ids)
    mask, zeros = (0,) * first + (1,) * (size - first), (0.0,) * size
    temperature = probe.temperature if sampled else 1.0
    temperatures = (1.0,) * first + (temperature,) * (size - first)
    return Sample(BASE, name, probe.ids, mask, zeros, zeros, temperatures, tuple(m - 1 for m in mask))
