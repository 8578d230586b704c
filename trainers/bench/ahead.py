"""`marlora bench ahead`: what it is worth to play ahead of the trainer, by staleness bound, where
playing takes its time elsewhere.

A run of GRPO on a small random model, whose engine answers after a while that has a long tail
(log-normal), as a server with replies of uneven length does. The time stands for work of other
devices, so nothing is gained by it but overlap; the learning is real and takes this machine's.
Other episodes are played at every bound, so this passes no gate: what is compared is time per step.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...agents.patterns.chain import Chain
from ...agents.types import Completion, Sampling, Task
from ...rollouts.engines.base import EngineInfo, ModelRef
from ...rollouts.engines.transformers import TransformersEngine
from ...rollouts.types import Episode
from ..methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from ..testbeds.pretraining import one_thread
from ..testbeds.tiny import tiny_random_model
from .measure import Options, machine, table

BOUNDS = (0, 1, 2)
STEPS, TASKS, SAMPLES = 7, 4, 6
MEDIAN, SPREAD = 0.35, 0.8  # seconds of a reply, and the standard deviation of their logarithm


class Elsewhere(TransformersEngine):
    """Answers after as long as another device would have taken."""

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        if replica is None:  # not the live proof's
            await asyncio.sleep(random.Random(sampling.seed).lognormvariate(0.0, SPREAD) * MEDIAN)
        return await super().generate(ids, ref, sampling, n, replica=replica)

    def info(self) -> EngineInfo:
        return replace(
            super().info(), deterministic=False
        )  # as a server: episodes begin when there is room


def varied(task: Task, episode: Episode) -> float:
    """Differs between replies: there is always something to learn."""
    return sum(str(episode.output).encode()) % 7 / 6


def run(model: Path, folder: Path, bound: int) -> dict[str, Any]:
    """Seconds per step after the first two, how old the episodes were, and how long the trainer
    waited for them."""
    tasks = [Task(f"t{n}", f"What is {n}?", "") for n in range(64)]
    args = GRPOConfig(
        output_dir=str(folder),
        model=str(model),
        max_staleness=bound,
        max_steps=STEPS,
        tasks_per_step=TASKS,
        num_generations=SAMPLES,
        max_completion_length=16,
        lora_r=4,
        learning_rate=1e-4,
        save_every=1000,
        num_eval_tasks=1,
        max_concurrency=TASKS * SAMPLES,
        lora_target_modules=["q_proj", "v_proj"],
        layout="padded",
        num_iterations=4,
    )
    engine = Elsewhere(str(model))
    trainer = GRPOTrainer(
        system=Chain(["solver", "critic"]),
        tasks=tasks[:-1],
        eval_tasks=tasks[-1:],
        rewards=[varied],
        args=args,
        engine=engine,
    )
    ends: list[float] = []
    with trainer.run as opened:
        for step in opened.steps():
            opened.finish(step, trainer.step(step))
            ends.append(time.perf_counter())
        opened.rollouts.background.run(engine.close())
    rows = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    each = [b - a for a, b in zip(ends[1:], ends[2:], strict=False)]
    waited = [
        b["seconds"]["rollout"] - a["seconds"]["rollout"]
        for a, b in zip(rows[1:], rows[2:], strict=False)
    ]
    return {
        "bound": bound,
        "seconds": each,
        "waited": waited,
        "sampled": sum(row["sampled_tokens"] for row in rows),
        "staleness": statistics.mean(row.get("staleness", 0.0) for row in rows[2:]),
        "oldest": max(row.get("max_staleness", 0) for row in rows),
    }


def ahead(options: Options) -> dict[str, Any]:
    """Seconds per step at every bound in turn."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as folder, one_thread():
        model = tiny_random_model(Path(folder) / "model", hidden_size=128, layers=3)
        for number in range(options.repeats):
            results += [run(model, Path(folder) / f"{bound}-{number}", bound) for bound in BOUNDS]
        where = machine()
    median = {
        b: statistics.median(s for r in results if r["bound"] == b for s in r["seconds"])
        for b in BOUNDS
    }
    rows = []
    for bound in BOUNDS:
        mine = [r for r in results if r["bound"] == bound]
        waited = statistics.median(s for r in mine for s in r["waited"])
        rows.append(
            [
                str(bound),
                f"{median[bound]:.2f}",
                f"{waited:.2f}",
                f"{statistics.mean(r['staleness'] for r in mine):.2f}",
                str(max(r["oldest"] for r in mine)),
                f"{median[0] / median[bound]:.2f}",
            ]
        )
    columns = [
        "max_staleness",
        "step, s",
        "waited, s",
        "mean staleness",
        "oldest",
        "times as fast as 0",
    ]
    return {
        "suite": "ahead",
        "clock": "wall",
        **where,
        "results": results,
        "median": {str(b): s for b, s in median.items()},
        **table(
            f"ahead: {TASKS * SAMPLES} episodes a step, replies after {MEDIAN} s in the median",
            columns,
            rows,
        ),
    }
