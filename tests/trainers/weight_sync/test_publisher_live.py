"""The live proof against a real vLLM server: right adapters pass, every fault fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from marlora.trainers.weight_sync.verification import VerificationRecord
from tests.live_server import Live
from tests.trainers.publishing import (
    BareBase,
    BareBaseButTwins,
    InPlace,
    Learner,
    Penalised,
    Previous,
    PreviousButTwins,
    Swapped,
    adapters_on,
    published,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
torch.set_num_threads(1)


def proofs(
    live: Live,
    test: str,
    wrap: Callable[[Any], Any] = lambda engine: engine,
    *,
    learning_rate: float,
    steps: Sequence[int],
    temperature: float = 1.0,
) -> list[VerificationRecord]:
    """`test` makes the policies' names, and so the adapters', this test's own."""
    adapters = adapters_on(live.model, policies=[f"reviewer-{test}", f"solver-{test}"])
    learner = Learner(adapters, learning_rate)

    async def run() -> list[VerificationRecord]:
        engine = wrap(live.engine())
        try:
            return await published(engine, live.root, adapters, learner, steps, temperature)
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.mark.parametrize(("learning_rate", "temperature"), [(1e-5, 1.0), (1e-5, 0.7), (1e-2, 0.7)])
def test_right_adapters_pass(server: Live, learning_rate: float, temperature: float):
    """After one step of 1e-5, and after a few of 1e-2; the log-probs are those at the run's
    temperature (float32 on both sides)."""
    name = f"right-{learning_rate:g}-{temperature}".replace(".", "_")
    made = proofs(
        server,
        name,
        learning_rate=learning_rate,
        steps=(1,) if learning_rate < 1e-3 else (1, 3),
        temperature=temperature,
    )
    assert [proof.status for proof in made] == ["passed", "passed"]
    assert all(
        proof.residual < 0.001 and proof.decode < 0.001 and proof.noise < 0.001 for proof in made
    )


@pytest.mark.parametrize(
    ("fault", "learning_rate", "steps", "part"),
    [
        (Swapped, 1e-5, (1,), "weights"),
        (Previous, 1e-5, (1, 1), "weights"),
        (PreviousButTwins, 1e-2, (3, 1), "decoding"),
        (BareBase, 1e-5, (1,), "weights"),
        (BareBaseButTwins, 1e-2, (3,), "decoding"),
        (Penalised, 1e-5, (1,), "decoding"),
        (InPlace, 1e-2, (3, 1), "decoding"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_fault_fails_the_proof(
    server: Live, fault: Any, learning_rate: float, steps: Sequence[int], part: str
):
    made = proofs(server, fault.__name__.lower(), fault, learning_rate=learning_rate, steps=steps)
    assert [proof.status for proof in made] == ["failed", "failed"]
    assert all(proof.reason.startswith(f"{part}: ") for proof in made), made
