"""The continuous batch: rows leave and enter, and no reply depends on its neighbours."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.engines.transformers_batch import ContinuousBatch
from marlora.rollouts.engines.transformers_sampler import Sampler, SampleRequest, draw_tokens
from tests.trainers.random_models import random_model

torch.set_num_threads(1)
REF = ModelRef("a")
LENGTHS = (9, 2, 5, 30, 1, 4, 12, 3, 7, 2, 6, 8)
TOKENS: Any = SimpleNamespace(eos_ids=(), decode=str)


def requests(lengths: Sequence[int] = LENGTHS) -> list[SampleRequest]:
    """Prompts with a common begin, of several lengths, settings and reply lengths."""
    shots = tuple(range(2, 12))
    return [
        SampleRequest(
            (*shots, *range(12, 13 + seed % 4)),
            REF,
            Sampling(temperature=(1.0, 0.7)[seed % 2], max_tokens=length),
            seed,
        )
        for seed, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(random_model(), TOKENS, "cpu")


def played(batch: ContinuousBatch, waiting: list[SampleRequest]) -> list[list[SampleRequest]]:
    """Who ended together, batch by batch, until nobody waits."""
    ended = []
    while waiting or batch.rows:
        entering = batch.entering(waiting)
        waiting = waiting[len(entering) :]
        ended.append(batch.advance(entering))
        assert len(batch.rows) + len(ended[-1]) <= batch.max_rows
    return ended


def test_replies_are_those_of_each_request_alone(sampler: Sampler) -> None:
    together, alone = requests(), requests()
    played(ContinuousBatch(sampler, REF, max_rows=4), list(together))
    for request in alone:
        sampler.decode([request])
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids == b.token_ids and len(a.token_ids) == a.sampling.max_tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-5)


def test_nobody_waits_for_the_longest_row(sampler: Sampler) -> None:
    """The row of 30 tokens is in the first batch, and the last to end; 89 tokens in 4 rows take no
    more passes than the longest reply, where batches decoded to their end take 30 + 12 + 8."""
    waiting = requests()
    passes: list[int] = []
    step = ContinuousBatch._step
    batch = ContinuousBatch(sampler, REF, max_rows=4)
    batch._step = lambda: (passes.append(len(batch.rows)), step(batch))[1]  # type: ignore[method-assign]
    ended = [request.sampling.max_tokens for group in played(batch, waiting) for request in group]
    assert ended[-1] == 30 and sorted(ended) == sorted(LENGTHS)
    assert len(passes) < 36 and max(passes) == 4


def test_room_is_counted_in_tokens(sampler: Sampler) -> None:
    """Prompts have 11 to 14 tokens: two rows of at most 20 fit 45; a longer one is alone."""
    batch = ContinuousBatch(sampler, REF, max_rows=8, max_tokens=45)
    four = requests((6, 6, 6, 6))
    assert batch.entering(four) == four[:2]
    long = requests((90,))
    assert batch.entering([*long, *four]) == long
    batch.advance(four[:1])
    assert batch.entering([replace(four[1], ref=ModelRef("b"))]) == []


def test_one_row_does_not_enter_a_large_batch(sampler: Sampler) -> None:
    """A pass over one prompt costs as much as one over several."""
    batch = ContinuousBatch(sampler, REF, max_rows=16)
    batch.rows = requests((5,) * 7)
    waiting = requests((5,) * 3)
    assert [len(batch.entering(waiting[:n])) for n in (1, 2, 3)] == [0, 0, 3]


def test_points_of_a_distribution_by_hand() -> None:
    """In blocks of 256; no token without probability, whatever the point."""
    probabilities = torch.zeros(4, 600)
    probabilities[:, [3, 255, 256, 599]] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    points = torch.tensor([0.0, 0.1 + 1e-6, 0.5 + 1e-6, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_tokens(probabilities.log(), points).tolist() == [3, 255, 256, 599]
    noisy = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    points = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cumulative = noisy.double().exp().cumsum(-1)
    plain = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True)
    assert draw_tokens(noisy, points).tolist() == plain[:, 0].tolist()


def test_a_cache_that_cannot_be_cut_is_decoded_to_its_end_and_said(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not Sampler(random_model("gemma3_text"), TOKENS, "cpu").shares
    assert "Gemma3ForCausalLM: prompts are read row by row" in caplog.text
    assert "DynamicSlidingWindowLayer" in caplog.text

    async def replies(shares: bool) -> list[tuple[int, ...]]:
        engine = TransformersEngine(model, max_batch=4)
        engine.sampler.shares = shares
        calls = (
            engine.generate((2, 9, 7), REF._replace(policy="base"), Sampling(max_tokens=n, seed=n))
            for n in LENGTHS
        )
        try:
            return [one.token_ids for (one,) in await asyncio.gather(*calls)]
        finally:
            await engine.close()

    assert asyncio.run(replies(True)) == asyncio.run(replies(False))
