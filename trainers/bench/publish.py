"""`marlora bench publish`: seconds from the last optimizer step to the first token of the new
version, and of the live proof.

Three adapters on one replica. Of the proof, the seconds of the trainer's own forward passes are
given too, during which the engine works.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...agents.types import Completion, Message, PolicySpec, Sampling
from ...rollouts.engines.base import Engine, ModelRef
from ...rollouts.engines.config import EngineConfig
from ...rollouts.engines.factory import start_engine
from ...rollouts.engines.hardware import choose_dtype, has_gpu
from ...rollouts.renderer import ChatRenderer, load_tokenizer
from ..batching.samples import TrainingSequence
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..methods.policy_gradient.grpo import GRPOConfig
from ..model.adapters import Adapters
from ..update.losses.policy_gradient import LossConfig, policy_loss
from ..update.optimizer_step import Optimizers, update
from ..weight_sync.probes import PROBES, Probe
from ..weight_sync.publisher import Publisher
from .geometry import served_folder
from .measure import Options, machine, table

POLICIES = ("planner", "solver", "reviewer")
TURNS, REPLY = 4, 16  # of every policy, and tokens of each
RATE, LOSS = 1e-4, LossConfig()
# Words that the model knows: on ids drawn at random bfloat16 is off by whole nats.
ASKED = (
    "Tom packs {a} boxes in the morning and {b} boxes in the afternoon. Each box holds {c} apples,"
    " and two apples in every box are sold before the evening. How many apples does Tom have left?"
    " Say the number only."
)
PARTS = {
    "publish": "stage, hash and load",
    "first_token": "until the first token",
    "prove": "live proof",
    "prove_trainer": "of it, the trainer's passes",
}


def engines(options: Options) -> list[str]:
    """Those asked for, or all that are here."""
    return (
        [options.engine]
        if options.engine
        else ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    )


def say(line: str) -> None:
    import sys

    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def served(
    options: Options, kind: str, policies: list[PolicySpec], **settings: Any
) -> Iterator[tuple[Any, ChatRenderer, Path, str]]:
    """(a function that starts the engine, tokens, scratch folder, the model's folder)."""
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        folder = Path(scratch)
        model = served_folder(options.size, folder)
        tokens = ChatRenderer(load_tokenizer(model))
        config = EngineConfig(engine=kind, max_model_len=512, **settings)
        yield (
            (lambda: start_engine(model, tokens, policies, config, folder=folder, say=say)),
            tokens,
            folder,
            model,
        )


def publish(options: Options) -> dict[str, Any]:
    """Seconds of every part, by engine."""
    policies = [PolicySpec(name) for name in POLICIES]
    results = {}
    for kind in engines(options):
        with served(options, kind, policies) as (start, tokens, folder, model):
            results[kind] = asyncio.run(
                _measure(start, tokens, folder, model, policies, options.repeats)
            )
    median = {
        kind: {part: statistics.median(r[part] for r in laps) for part in PARTS}
        for kind, laps in results.items()
    }
    rows = [
        [kind, what, *(f"{f([r[part] for r in laps]):.3f}" for f in (statistics.median, min, max))]
        for kind, laps in results.items()
        for part, what in PARTS.items()
    ]
    return {
        "suite": "publish",
        "size": options.size,
        "clock": "wall",
        **machine(),
        "adapters": len(POLICIES),
        "results": results,
        "median": median,
        **table(
            f"publish: {len(POLICIES)} adapters, {options.size}",
            ["engine", "part", "median, s", "smallest", "largest"],
            rows,
        ),
    }


async def _measure(
    start: Any,
    tokens: ChatRenderer,
    folder: Path,
    model: str,
    policies: list[PolicySpec],
    repeats: int,
) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
    adapters = Adapters(AutoModelForCausalLM.from_pretrained(model, dtype=dtype), policies, seed=0)
    optimizers = Optimizers(adapters, GRPOConfig(learning_rate=RATE))
    engine: Engine = await start()
    publisher = Publisher(folder / "versions", adapters, engine)
    try:
        laps = [
            await lap(engine, tokens, publisher, optimizers, step, POLICIES)
            for step in range(1, repeats + 2)
        ]
        return laps[1:]  # the first one warms up
    finally:
        await engine.close()


async def lap(
    engine: Engine,
    tokens: ChatRenderer,
    publisher: Publisher,
    optimizers: Optimizers,
    step: int,
    policies: Sequence[str],
) -> dict[str, float]:
    """Seconds of the parts of one step of these policies: learn, publish, sample one token, verify.
    Raises `RunError` if a verification does not pass."""
    prompts = [
        tokens.prompt([Message("user", ASKED.format(a=step, b=k + 3, c=step + k))])
        for k in range(TURNS)
    ]
    learnt, probes = await _turns(engine, publisher, prompts, policies)
    ranks = Ranks()
    ranks.device = optimizers.adapters.device
    update(optimizers, learnt, lambda inputs: policy_loss(inputs, LOSS), step, ranks)
    start = time.perf_counter()
    await publisher.publish(step, policies)
    published = time.perf_counter()
    await asyncio.gather(
        *(
            engine.generate(prompts[0], ModelRef(n, v), Sampling(max_tokens=1, seed=0))
            for n, v in publisher.versions.items()
        )
    )
    spoke = time.perf_counter()
    with _timed(publisher) as trainer:
        proofs = await publisher.verify(step, probes, final=True)  # a failed proof raises
    proven = time.perf_counter()
    if len(proofs) != len(policies) or any(proof.status != "passed" for proof in proofs):
        raise RunError(f"bench publish: a proof did not pass ({proofs}); no time is given")
    return {
        "publish": published - start,
        "first_token": spoke - start,
        "prove": proven - spoke,
        "prove_trainer": sum(trainer),
        "forwards": len(trainer),
        "prompt_tokens": len(prompts[0]),
        "residual": max(p.residual or 0.0 for p in proofs),
    }


async def _turns(
    engine: Engine, publisher: Publisher, prompts: Sequence[Any], policies: Sequence[str]
) -> tuple[list[TrainingSequence], dict[str, list[Probe]]]:
    """Turns of the current versions, sampled for every policy: what a step learns from, and the
    windows that verify it."""
    probes: dict[str, list[Probe]] = {}
    learnt: list[TrainingSequence] = []
    for number, name in enumerate(policies):
        ref = ModelRef(name, publisher.versions.get(name, ""))
        sampling = Sampling(max_tokens=REPLY, seed=number)
        completions = await asyncio.gather(
            *(engine.generate(prompt, ref, sampling) for prompt in prompts)
        )
        replies = [reply for (reply,) in completions]
        probes[name] = [
            Probe(reply.prompt_ids + reply.token_ids, len(reply.prompt_ids))
            for reply in replies[:PROBES]
        ]
        learnt += [_sample(name, k, reply) for k, reply in enumerate(replies)]
    return learnt, probes


def _sample(policy: str, number: int, reply: Completion) -> TrainingSequence:
    """Every other reply was good, the others were bad."""
    before, own = len(reply.prompt_ids), len(reply.token_ids)

    def row(rest: float, value: float) -> tuple[float, ...]:
        return (rest,) * before + (value,) * own

    advantage = 1.0 if number % 2 else -1.0
    return TrainingSequence(
        policy,
        str(number),
        reply.prompt_ids + reply.token_ids,
        (0,) * before + (1,) * own,
        (0.0,) * before + reply.logprobs,
        row(0.0, advantage),
        row(1.0, 1.0),
        (-1,) * before + (0,) * own,
    )


@contextlib.contextmanager
def _timed(publisher: Publisher) -> Iterator[list[float]]:
    """The seconds of every forward pass of the trainer's that the publisher asks for meanwhile."""
    seconds: list[float] = []
    ask = publisher.verifier.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        scores = ask(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return scores

    publisher.verifier.forward = timed
    try:
        yield seconds
    finally:
        publisher.verifier.forward = ask
