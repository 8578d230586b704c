"""Parts of `marlora bench gpu` that serve: adapters side by side in vLLM, seconds to publish
eight of them, and a whole training loop."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ....agents.patterns.chain import Chain
from ....agents.types import PolicySpec, Task
from ....rollouts.engines.base import Engine, ModelRef
from ....rollouts.engines.config import EngineConfig
from ....rollouts.engines.factory import start_engine
from ....rollouts.engines.hardware import choose_dtype, has_gpu
from ....rollouts.renderer import ChatRenderer, load_tokenizer
from ...errors import RunError
from ...methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from ...model.adapters import Adapters
from ...update.optimizer_step import Optimizers
from ...weight_sync.publisher import Publisher
from ..geometry import served_folder
from ..measure import Options
from ..publish import lap, say
from ..serve import POLICIES, measured
from ..update import disturb
from .training import free_memory
from .work import Work

Results = Iterator[tuple[str, dict[str, Any]]]
NUMBERS = (0, 1, 4, 8)  # adapters that answer side by side
MEMORY = {"cuda": 0.5, "cpu": 1.0}  # the server's: share of a GPU, GiB of cache on a CPU
NO_VLLM = "vllm is not installed here"


class LeftOut(Exception):
    """A part that cannot run here, and why."""


def adapters_part(options: Options, work: Work) -> Results:
    """Tokens per second of one vLLM server with 0, 1, 4 and 8 adapters in a wave; then seconds to
    publish all eight, to the first token of the new versions, and of their live proof."""
    if importlib.util.find_spec("vllm") is None:
        raise LeftOut(NO_VLLM)
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        folder = Path(scratch)
        model = served_folder(work.served, folder, options.device)
        free_memory()  # for the server
        tokens = ChatRenderer(load_tokenizer(model))
        config = EngineConfig(
            engine="vllm", max_model_len=512, server_memory=MEMORY[options.device]
        )
        start = time.perf_counter()
        with asyncio.Runner() as runner:
            engine = runner.run(
                start_engine(model, tokens, POLICIES, config, folder=folder, say=say)
            )
            try:
                seconds = time.perf_counter() - start
                yield "start", {"seconds": seconds, "says": f"the server took {seconds:.0f} s"}
                adapters = trained_model(model, POLICIES, options)
                yield "adapters", runner.run(_waves(engine, adapters, folder, options, work))
                yield from _publishing(runner, engine, tokens, adapters, folder, options)
            finally:
                runner.run(engine.close())


def trained_model(model: str, policies: Sequence[PolicySpec], options: Options) -> Adapters:
    """The trainer's side: the served base on its device, with an adapter for each policy."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(options.device)
    return Adapters(base, policies, seed=0)


async def _waves(
    engine: Engine, adapters: Adapters, folder: Path, options: Options, work: Work
) -> dict[str, Any]:
    disturb(adapters, seed=1, std=0.002)
    saved = {
        p.name: adapters.save(p.name, folder / "versions" / f"{p.name}-v1-bench") for p in POLICIES
    }
    refs = [ModelRef(policy, v) for policy, v in (await engine.publish(saved)).items()]
    found = await measured(
        engine, refs, work.callers, options.repeats, numbers=NUMBERS, reply=work.reply
    )
    for ref in refs:
        await engine.retire(ref)
    rates = found["tokens_per_second"]
    says = ", ".join(f"{n} adapters: {rate:,.0f} tokens/s" for n, rate in rates.items())
    return {**found, "callers": work.callers, "reply": work.reply, "says": says}


def _publishing(
    runner: asyncio.Runner,
    engine: Engine,
    tokens: ChatRenderer,
    adapters: Adapters,
    folder: Path,
    options: Options,
) -> Results:
    """A lap per round after one that warms up. A proof that fails ends it."""
    publisher = Publisher(folder / "versions", adapters, engine)
    optimizers = Optimizers(adapters, GRPOConfig(learning_rate=1e-4))
    names = [policy.name for policy in POLICIES]
    laps: list[dict[str, float]] = []
    for step in range(1, options.repeats + 2):
        laps.append(runner.run(lap(engine, tokens, publisher, optimizers, step, names)))
    median = {key: statistics.median(one[key] for one in laps[1:]) for key in laps[0]}
    says = (
        f"{len(names)} published in {median['publish']:.2f} s, first token after"
        f" {median['first_token']:.2f} s, proven in {median['prove']:.2f} s"
    )
    yield "publish", {"laps": laps[1:], "median": median, "says": says}


class _Steps(GRPOTrainer):
    """Notes when each step begins."""

    begun: list[float]

    def collect(self, step: int) -> Any:
        self.begun.append(time.perf_counter())
        return super().collect(step)


def loop_part(options: Options, work: Work) -> Results:
    """Whole steps of a chain of two agents with an adapter each: sample, score, learn, publish and
    prove; by vLLM where it is installed, else in this process."""
    tasks_per_step, group, steps = work.loop
    kind = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    kind = options.engine or kind
    tasks = [Task(str(k), f"{k} + {k + 3}", split="train") for k in range(tasks_per_step * steps)]
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        folder = Path(scratch)
        model = served_folder(work.served, folder, options.device)
        free_memory()  # for the server
        trainer = _Steps(
            model=model,
            system=Chain(["solver", "critic"]),
            tasks=tasks,
            eval_tasks=[Task("held-out", "1 + 1", split="eval")],
            rewards=[lambda task, episode: sum(str(episode.output).encode()) % 7 / 6],
            args=GRPOConfig(
                output_dir=str(folder / "run"),
                engine=kind,
                max_steps=steps,
                tasks_per_step=tasks_per_step,
                num_generations=group,
                max_completion_length=work.reply,
                save_every=10**6,
                num_eval_tasks=1,
                max_model_len=1024 if work.served != "tiny" else 512,
            ),
        )
        trainer.begun = []
        summary = trainer.train()
        rows = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    yield "loop", _loop_result(kind, trainer.begun, [json.loads(row) for row in rows], summary)


def _loop_result(
    kind: str, begun: Sequence[float], rows: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> dict[str, Any]:
    """From begin to begin, without the first step, which warms up, and the last, which saves.
    Raises `RunError` if an adapter did not move."""
    if any(p["sha256_before"] == p["sha256_after"] for p in summary["policies"].values()):
        raise RunError("bench gpu: an adapter did not move in the loop; no numbers are given")
    laps = [b - a for a, b in zip(begun, begun[1:], strict=False)][1:]
    sampled = [row["sampled_tokens"] for row in rows[1:-1]]
    phases = {
        phase: statistics.median(
            b["seconds"][phase] - a["seconds"][phase]
            for a, b in zip(rows, rows[1:-1], strict=False)
        )
        for phase in ("rollout", "train", "publish")
    }
    seconds, tokens = statistics.median(laps), statistics.mean(sampled)
    return {
        "engine": kind,
        "seconds_per_step": seconds,
        "phases": phases,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / seconds,
        "proof": summary["live_proof"],
        "says": f"{kind}: {seconds:.2f} s a step, {tokens / seconds:,.0f} sampled tokens/s",
    }
