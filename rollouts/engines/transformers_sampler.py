"""Sampler of the in-process engine: decoding and scoring by one model, in torch.

A token is the inverse of the cumulative distribution at a uniform number drawn from the request's
own seed, so that a batch gives the same tokens whenever it is decoded. Everything here runs in the
engine's one worker thread. torch is imported inside functions only.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.types import Sampling, SettingError
from ..renderer import ChatRenderer
from .base import ModelRef
from .transformers_adapters import LoadedAdapters
from .transformers_exactness import padding_is_exact, use_exact_attention
from .transformers_prompts import why_not_shared

log = logging.getLogger(__name__)
SCORED = 1024  # tokens that are scored together, but for a row that is longer
BLOCK = 256  # tokens of the vocabulary whose probabilities are added up together


@dataclass(eq=False)
class SampleRequest:
    """One reply to be sampled: prompt ids, adapter, sampling; and the tokens sampled so far."""

    ids: tuple[int, ...]
    ref: ModelRef
    sampling: Sampling  # without its seed, so that requests can be compared
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    noise: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.noise = random.Random(self.seed)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Logits of requests of equal value are shaped together."""
        s = self.sampling
        settings = (
            s.temperature,
            s.top_p,
            s.top_k,
            s.min_p,
            s.repetition_penalty,
            s.presence_penalty,
            s.frequency_penalty,
        )
        return (settings, tuple(sorted(s.logit_bias.items())))

    @property
    def batch(self) -> tuple[Any, ...]:
        """Requests of equal value can be decoded together."""
        return (self.ref, *self.shape, self.sampling.max_tokens, self.sampling.stop)

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key: depends on nothing but the request."""
        return (*self.batch, len(self.ids), self.seed, self.ids)


def load_model(model: str, dtype: str, device: str) -> Any:
    """The frozen model on its device, as it attends itself. Raises `SettingError` if it cannot be
    loaded."""
    from transformers import AutoModelForCausalLM

    try:
        # without False, transformers asks on the terminal whether to run the code that a model
        # folder brings
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
        on_device = loaded.to(device).eval()
    except (OSError, ValueError) as error:
        raise SettingError(
            f"model {model!r}: cannot be loaded ({str(error).splitlines()[0]})"
        ) from error
    on_device.requires_grad_(False)
    use_exact_attention(on_device)
    return on_device


class Sampler:
    """A causal language model with switchable LoRA adapters.

    At temperature 0 the log-probabilities are those at temperature 1; otherwise those of the
    distribution the token was drawn from.

    Args:
        model: on its device, frozen, in eval mode.
        tokens: decodes stop strings, and names the tokens that end a reply.
    """

    def __init__(self, model: Any, tokens: ChatRenderer, device: str) -> None:
        self.tokens, self.device = tokens, device
        self.adapters = LoadedAdapters(model, device)
        # may prompts of several lengths be padded to one batch?
        self.pads = padding_is_exact(model)
        # may prompts be read as trees, and rows come and go? Else batches are decoded to their end
        why = why_not_shared(model)
        self.shares = not why
        if why:
            log.warning(
                "%s: prompts are read row by row, and replies wait for the longest of their batch:"
                " %s",
                type(model).__name__,
                why,
            )

    @property
    def model(self) -> Any:
        """With the adapters that are loaded."""
        return self.adapters.model

    def activate(self, ref: ModelRef) -> None:
        """Switch to this version's adapter, or to the bare base."""
        self.adapters.activate(ref.version)

    def score(self, rows: Sequence[tuple[int, ...]], ref: ModelRef) -> list[list[float]]:
        """Of each row the log-probabilities [len(row) - 1] of row[1:] at temperature 1."""
        import torch

        together: list[list[tuple[int, ...]]] = []
        for row in rows:
            last = together[-1] if together else []
            if last and self.pads and max(map(len, (*last, row))) * (len(last) + 1) <= SCORED:
                last.append(row)
            else:
                together.append([row])
        with torch.inference_mode():
            self.activate(ref)
            return [scores for batch in together for scores in self._score(batch)]

    def _score(self, rows: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """The same of one batch, padded behind its rows: no token sees what follows it."""
        import torch

        width = max(map(len, rows))
        ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=self.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        scores = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0].tolist()
        return [one[: len(row) - 1] for one, row in zip(scores, rows, strict=True)]

    def decode(self, batch: Sequence[SampleRequest]) -> None:
        """Fill in tokens, log-probs and finish reason of each request. All have the same ref and
        sampling.

        Equal prompts are read once. Rows that have ended are dropped from the cache when half of
        them have.
        """
        import torch

        with torch.inference_mode():
            self.activate(batch[0].ref)
            prompts = list(dict.fromkeys(request.ids for request in batch))
            width = max(map(len, prompts))
            ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts], device=self.device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device
            )
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
            rows = list(batch)
            selected = torch.tensor(
                [prompts.index(request.ids) for request in batch], device=self.device
            )
            cache, logits, mask = out.past_key_values, out.logits[:, -1][selected], mask[selected]
            if len(prompts) < len(batch):
                cache.reorder_cache(selected)
            while True:
                tokens = self.draw(rows, logits)
                unfinished = [i for i, request in enumerate(rows) if not request.finish_reason]
                if not unfinished:
                    return
                if len(unfinished) <= len(rows) // 2:
                    selected = torch.tensor(unfinished, device=self.device)
                    cache.reorder_cache(selected)
                    rows = [rows[i] for i in unfinished]
                    tokens, mask = tokens[selected], mask[selected]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                out = self.model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, logits = out.past_key_values, out.logits[:, -1]

    def draw(self, rows: Sequence[SampleRequest], logits: Any) -> Any:
        """Draw a token [B] for each row from logits [B, V]; append it to the rows that have not
        ended."""
        import torch

        kinds: dict[tuple[Any, ...], list[int]] = {}
        for row, request in enumerate(rows):
            kinds.setdefault(request.shape, []).append(row)
        tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for kind in kinds.values():
            at = torch.tensor(kind, device=logits.device)
            tokens[at] = self._draw([rows[row] for row in kind], logits[at])
        return tokens

    def _draw(self, rows: list[SampleRequest], logits: Any) -> Any:
        """The same for rows whose logits are shaped alike."""
        import torch

        sampling = rows[0].sampling
        shaped = shape_logits(
            logits.float(), sampling, [r.ids for r in rows], [r.token_ids for r in rows]
        )
        logprobs = torch.log_softmax(shaped, -1)
        if sampling.temperature == 0:
            tokens = shaped.argmax(-1)
        else:
            uniform = [request.noise.random() for request in rows]
            tokens = draw_tokens(logprobs, torch.tensor(uniform, dtype=torch.float64))
        drawn = logprobs.gather(1, tokens[:, None])[:, 0]
        for request, token, logprob in zip(rows, tokens.tolist(), drawn.tolist(), strict=True):
            if not request.finish_reason:
                request.token_ids.append(token)
                request.logprobs.append(logprob)
                request.finish_reason = self._end(request)
        return tokens

    def _end(self, request: SampleRequest) -> str:
        """The finish reason after the newest token, "" if the reply goes on."""
        stop = request.sampling.stop
        if request.token_ids[-1] in self.tokens.eos_ids:
            return "stop"
        # a stop string ends in the newest token, so a tail of as many tokens as it has bytes is
        # enough
        if stop:
            tail = request.token_ids[-max(len(s.encode()) for s in stop) - 4 :]
            if any(s in self.tokens.decode(tail) for s in stop):
                return "stop"
        return "length" if len(request.token_ids) >= request.sampling.max_tokens else ""


def draw_tokens(logprobs: Any, uniform: Any) -> Any:
    """The tokens [B] at these points [B] of the cumulative distributions [B, V], both in [0, 1).

    Blocks of the vocabulary are added up first, so only the block that a point lies in is
    accumulated in double precision.
    """
    import torch

    missing = -logprobs.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(logprobs.exp(), (0, missing)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    before = sums.cumsum(-1)
    below = 1 - 2.0**-40  # so that rounding never comes to the end of a sum
    points = uniform.to(before.device)[:, None] * below * before[:, -1:]
    block = torch.searchsorted(before, points, right=True)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    rest = points - before.gather(1, block) + sums.gather(1, block)
    # sums of single precision differ from `inside` in their last bits
    rest = torch.minimum(rest.clamp(min=0), below * inside[:, -1:])
    return (block * BLOCK + torch.searchsorted(inside, rest, right=True))[:, 0]


def shape_logits(
    logits: Any,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]],
) -> Any:
    """The logits [B, V] a token is drawn from: penalties, bias, temperature, min_p, top_k, top_p,
    in this order.

    Repetition counts prompt and reply, presence and frequency the reply alone. Temperature 0 stays
    at 1: its token is the largest.
    """
    import torch
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for row, (before, after) in enumerate(zip(prompts, sampled, strict=True)):
            seen[row, list({*before, *after})] = True
        factor = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / factor, logits * factor), logits
        )
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = torch.zeros_like(logits)
        for row, after in enumerate(sampled):
            counts[row] = torch.bincount(
                torch.tensor(after, dtype=torch.long), minlength=logits.shape[-1]
            ).to(logits)
        logits = (
            logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        )
    if sampling.logit_bias:
        logits = logits.clone()
        logits[:, [int(token) for token in sampling.logit_bias]] += torch.tensor(
            list(sampling.logit_bias.values())
        ).to(logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        logits = MinPLogitsWarper(sampling.min_p)(None, logits)
    if sampling.top_k > 0:
        logits = TopKLogitsWarper(sampling.top_k)(None, logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits
