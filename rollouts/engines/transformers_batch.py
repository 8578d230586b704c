"""Continuous batch of the in-process engine: rows of one adapter that are decoded together, which
leave when they have ended and make room for others, in torch.

Ended rows leave when they are an eighth of the batch, and new ones enter when they are a third of
what is still there: cutting and growing a cache copies it, and a pass over few tokens costs as much
as one over many. When that is follows from the rows alone, so the same requests meet in the same
batches. torch is imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .base import ModelRef
from .transformers_prompts import as_cache, read

if TYPE_CHECKING:
    from .transformers_sampler import Sampler, SampleRequest

CACHE = 2**16  # tokens of all rows together, prompts and replies, padding included
LEAVE, ENTER = 8, 3


class ContinuousBatch:
    """Rows that are being decoded.

    Args:
        sampler: of a model whose cache can be cut and joined (`Sampler.shares`).
        ref: the adapter of all rows.
        max_rows: rows at once.
        max_tokens: of the cache, as if every row came to its `max_tokens`; one row may have more.
    """

    def __init__(
        self, sampler: Sampler, ref: ModelRef, max_rows: int, max_tokens: int = CACHE
    ) -> None:
        self.sampler, self.ref = sampler, ref
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.rows: list[SampleRequest] = []
        self._cache: Any = None
        self._mask: Any = None  # [B, W], 1 on tokens; rows are padded on their left
        self._tokens: Any = None  # [B], the newest, which the cache does not hold yet

    def entering(self, waiting: Iterable[SampleRequest]) -> list[SampleRequest]:
        """Which of the requests that wait enter now: the first ones, if they have the batch's
        adapter, find room and are worth a pass."""
        found: list[SampleRequest] = []
        width = self._width(self.rows)
        for request in waiting:
            rows = len(self.rows) + len(found) + 1
            width = max(width, self._width([request]))
            full = rows > self.max_rows or rows * width > self.max_tokens
            if request.ref != self.ref or (full and rows > 1):
                break
            found.append(request)
        return found if len(found) * ENTER >= len(self.rows) else []

    def _width(self, rows: Sequence[SampleRequest]) -> int:
        """Of the cache when the longest of these rows has ended."""
        left = max((r.sampling.max_tokens - len(r.token_ids) for r in rows), default=0)
        return max((len(r.ids) + len(r.token_ids) for r in rows), default=0) + left

    def advance(self, entering: Sequence[SampleRequest]) -> list[SampleRequest]:
        """Read the prompts of those that enter, and decode until some rows have ended; they leave
        the batch and are returned."""
        import torch

        with torch.inference_mode():
            self.sampler.activate(self.ref)
            if entering:
                self._enter(entering)
            while len(ended := [r for r in self.rows if r.finish_reason]) * LEAVE < len(self.rows):
                self._step()
            self._keep([i for i, r in enumerate(self.rows) if not r.finish_reason])
            return ended

    def _enter(self, requests: Sequence[SampleRequest]) -> None:
        import torch

        new = read(self.sampler.model, [request.ids for request in requests])
        tokens = self.sampler.draw(requests, new.logits)
        keys, values, mask = new.keys, new.values, new.mask
        if self.rows:
            layers, width = self._cache.layers, max(self._mask.shape[1], mask.shape[1])
            keys = [_joined(a.keys, b, width) for a, b in zip(layers, keys, strict=True)]
            values = [_joined(a.values, b, width) for a, b in zip(layers, values, strict=True)]
            mask = torch.cat([_widened(m, 1, width) for m in (self._mask, mask)])
            tokens = torch.cat([self._tokens, tokens])
        self._cache, self._mask, self._tokens = as_cache(keys, values), mask, tokens
        self.rows = [*self.rows, *requests]

    def _step(self) -> None:
        """One token more for every row; one that has ended goes on unheard until it leaves."""
        import torch

        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], 1)
        out = self.sampler.model(
            input_ids=self._tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._mask.sum(1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = out.past_key_values
        self._tokens = self.sampler.draw(self.rows, out.logits[:, -1])

    def _keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the columns in which none of them has a token."""
        import torch

        self.rows = [self.rows[i] for i in rows]
        if not rows:
            self._cache = self._mask = self._tokens = None
            return
        at = torch.tensor(rows, device=self._mask.device)
        first = int(self._mask[at].any(0).int().argmax())
        self._mask, self._tokens = self._mask[at, first:], self._tokens[at]
        for layer in self._cache.layers:
            layer.keys = layer.keys[:, :, first:].index_select(0, at)
            layer.values = layer.values[:, :, first:].index_select(0, at)


def _widened(tensor: Any, dim: int, width: int) -> Any:
    """With zeros before it, so that it has this width."""
    import torch

    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor


def _joined(a: Any, b: Any, width: int) -> Any:
    import torch

    return torch.cat([_widened(a, 2, width), _widened(b, 2, width)])
