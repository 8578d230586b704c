"""CoMLRL's MAGRPO (1.4.3) beside ours: two agents, one task a step, `group` replies of each. An
opponent of `marlora bench loop`, if asked for.

CoMLRL trains a full model per agent and samples by `generate`; ours trains a LoRA per agent on one
base. It is installed into a folder that is thrown away, with wandb, which it imports, and finds
torch and transformers where marlora does. Either side has a process of its own, which takes its
steps alone: `python -m marlora.trainers.bench.comlrl WHO MODEL GROUP REPLY STEPS FOLDER` prints
seconds a step and peak memory.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from .measure import memory

VERSION = "1.4.3"
AGENTS = ("first", "last")


def against_comlrl(model: str, group: int, reply: int, repeats: int) -> dict[str, dict[str, float]]:
    """{"ours" | "comlrl": seconds of a step and peak memory}. Raises `RunError` with the
    installer's or the trainer's words."""
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        there = Path(scratch) / "comlrl"
        for what in (["--no-deps", f"comlrl=={VERSION}"], ["wandb"]):
            _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(there), *what], {})
        found = {}
        for who in ("comlrl", "ours"):
            paths = [
                *([str(there)] if who == "comlrl" else []),
                *filter(None, [os.environ.get("PYTHONPATH")]),
            ]
            argv = [
                sys.executable,
                "-m",
                __name__,
                who,
                model,
                str(group),
                str(reply),
                str(repeats + 2),
                scratch,
            ]
            found[who] = json.loads(
                _run(argv, {"PYTHONPATH": os.pathsep.join(paths)}).splitlines()[-1]
            )
        return found


def _run(argv: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RunError(
            f"bench loop: {' '.join(argv[1:4])} ... failed; no numbers are"
            f" given\n{done.stderr[-2000:]}"
        )
    return done.stdout


def theirs(model: str, group: int, reply: int, steps: int) -> list[float]:
    """When each of `steps` steps had sampled."""
    import torch
    from comlrl.trainers.reinforce.magrpo import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...rollouts.engines.hardware import choose_dtype, has_gpu

    times: list[float] = []

    def reward(*completions: Any, **given: Any) -> list[float]:
        times.append(time.perf_counter())
        return [float(sum(str(text).encode()) % 7) / 6 for text in completions[0]]

    dtype = getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    args = MAGRPOConfig(
        num_train_epochs=1,
        num_agents=len(AGENTS),
        num_generations=group,
        max_new_tokens=reply,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        num_turns=1,
        eval_interval=0,
        eval_num_samples=0,
        rollout_buffer_size=1,
        agent_learning_rate=1e-5,
    )
    MAGRPOTrainer(
        agents=[AutoModelForCausalLM.from_pretrained(model, dtype=dtype) for _ in AGENTS],
        num_agents=len(AGENTS),
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"{k} + {k + 3}" for k in range(steps)]}),
        reward_func=reward,
        args=args,
        formatters=[lambda item, *more: item["prompt"]] * len(AGENTS),
    ).train()
    return times[group - 1 :: group]  # every reply of the group was scored by itself


def ours(model: str, group: int, reply: int, steps: int, folder: Path) -> list[float]:
    """When each of `steps` steps had sampled."""
    from ...agents.patterns.chain import Chain
    from ...agents.types import Task
    from ...rollouts.types import Episode
    from ..methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer

    times: list[float] = []

    class Timed(GRPOTrainer):
        def collect(self, step: int) -> list[Episode]:
            found = super().collect(step)
            times.append(time.perf_counter())
            return found

    Timed(
        model=model,
        system=Chain(list(AGENTS)),
        tasks=[Task(str(k), f"{k} + {k + 3}") for k in range(steps)],
        eval_tasks=[Task("held-out", "1 + 1", split="eval")],
        rewards=[lambda task, episode: float(sum(str(episode.output).encode()) % 7) / 6],
        args=GRPOConfig(
            output_dir=str(folder / "ours"),
            engine="transformers",
            max_steps=steps,
            tasks_per_step=1,
            num_generations=group,
            max_completion_length=reply,
            learning_rate=1e-4,
            save_every=10**6,
            num_eval_tasks=1,
        ),
    ).train()
    return times


if __name__ == "__main__":
    who, model, group, reply, steps, folder = sys.argv[1:]
    shape = (model, int(group), int(reply), int(steps))
    sampled = theirs(*shape) if who == "comlrl" else ours(*shape, Path(folder))
    laps = [b - a for a, b in zip(sampled, sampled[1:], strict=False)][
        1:
    ]  # the first step warms up
    if len(sampled) != int(steps):
        raise SystemExit(f"{len(sampled)} of {steps} steps were scored")
    print(json.dumps({"seconds": statistics.median(laps), "peak_bytes": memory("VmHWM")}))
