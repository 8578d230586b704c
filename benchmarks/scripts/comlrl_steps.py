"""Whole steps of CoMLRL's MAGRPO (1.4.3) and of marlora: two agents, one task a step, `group`
replies of each.

The work is the same: both agents answer the same chat, side by side (a debate of one round; a chain
whose second agent waits for the first is nothing that MAGRPO's single turn does), sampled from the
whole distribution at temperature 1; that the prompts are the same tokens is checked, and how many
tokens were sampled is given. What differs is the method: CoMLRL trains a full model per agent,
samples by `generate` and keeps nothing; marlora trains a LoRA per agent on one base, stores every
episode, publishes and proves every step. CoMLRL is installed into a temporary folder, with wandb,
which it imports, and uses the torch and transformers that marlora uses. Since it installs a
package, this is no part of the wheel;
`marlora bench loop --opponents comlrl` runs it from a checkout:

    python benchmarks/scripts/comlrl_steps.py both MODEL GROUP REPLY STEPS FOLDER

prints {"ours" | "comlrl": seconds and sampled tokens of a step, tokens of its prompt, and peak
memory} as JSON. With `ours` or `comlrl` for
`both` it takes the steps of one side, which has a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlora.trainers.bench.measure import memory

VERSION = "1.4.3"
AGENTS = ("first", "last")


def both(model: str, group: int, reply: int, steps: int, folder: Path) -> dict[str, Any]:
    """Install CoMLRL below `folder` and take the steps of either side in a process of its own."""
    packages = folder / "comlrl"
    for what in (["--no-deps", f"comlrl=={VERSION}"], ["wandb"]):
        _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(packages), *what], [])
    shape = [model, str(group), str(reply), str(steps), str(folder)]
    results = {}
    for side, paths in (("comlrl", [str(packages)]), ("ours", [])):
        output = _run([sys.executable, __file__, side, *shape], paths)
        results[side] = json.loads(output.splitlines()[-1])
    prompts = {side: result["prompt_tokens"] for side, result in results.items()}
    if prompts["ours"] != prompts["comlrl"]:
        raise SystemExit(f"the prompts are not the same, {prompts} tokens; no numbers are given")
    return results


def _run(argv: Sequence[str], paths: Sequence[str]) -> str:
    """What a program prints, with `paths` before those of PYTHONPATH. Exits with its last words if
    it fails."""
    known = [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known)}
    done = subprocess.run(
        argv, capture_output=True, text=True, env=environment, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(argv[1:4])} ... failed\n{done.stderr[-2000:]}")
    return done.stdout


@dataclass
class Steps:
    """When each step had sampled, how many tokens, and how long the first prompt was."""

    times: list[float]
    sampled: list[int]
    prompt_tokens: int


def theirs(model: str, group: int, reply: int, steps: int) -> Steps:
    import torch
    from comlrl.trainers.reinforce.magrpo import MAGRPOConfig, MAGRPOTrainer
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from marlora.rollouts.engines.hardware import choose_dtype, has_gpu

    times: list[float] = []
    prompts: list[int] = []
    sampled: list[int] = []

    def reward(*completions: Any, **given: Any) -> list[float]:
        times.append(time.perf_counter())
        return [float(sum(str(text).encode()) % 7) / 6 for text in completions[0]]

    def counted(agent: Any) -> Any:
        generate = agent.generate

        def count(**inputs: Any) -> Any:
            out = generate(**inputs)
            width = inputs["input_ids"].shape[1]
            prompts.append(width)
            ended = out.sequences[:, width:] == tokenizer.eos_token_id
            # up to the first end, which was sampled too; what follows it is padding
            sampled.append(int((ended.cumsum(1) - ended.int() == 0).sum()))
            return out

        agent.generate = count
        return agent

    def chat(item: dict[str, Any], *more: Any) -> str:
        messages = [{"role": "user", "content": item["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

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
        top_k=0,  # None would leave the 50 of `generate`
        num_turns=1,
        eval_interval=0,
        eval_num_samples=0,
        rollout_buffer_size=1,
        agent_learning_rate=1e-5,
    )
    MAGRPOTrainer(
        agents=[counted(AutoModelForCausalLM.from_pretrained(model, dtype=dtype)) for _ in AGENTS],
        num_agents=len(AGENTS),
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"{k} + {k + 3}" for k in range(steps)]}),
        reward_func=reward,
        args=args,
        formatters=[chat] * len(AGENTS),
    ).train()
    per_step = [sum(sampled[k : k + len(AGENTS)]) for k in range(0, len(sampled), len(AGENTS))]
    # every reply of the group was scored by itself
    return Steps(times[group - 1 :: group], per_step, prompts[0])


def ours(model: str, group: int, reply: int, steps: int, folder: Path) -> Steps:
    from marlora.agents.patterns.debate import Debate
    from marlora.agents.types import Task
    from marlora.rollouts.types import Episode
    from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer

    times: list[float] = []
    sampled: list[int] = []
    prompts: list[int] = []

    class Timed(GRPOTrainer):
        def collect(self, step: int) -> list[Episode]:
            episodes = super().collect(step)
            times.append(time.perf_counter())
            turns = [turn for episode in episodes for turn in episode.turns]
            sampled.append(sum(len(turn.token_ids) for turn in turns))
            prompts.append(len(turns[0].prompt_ids))
            return episodes

    Timed(
        model=model,
        system=Debate(list(AGENTS), rounds=1),
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
    return Steps(times, sampled, prompts[0])


def one_side(side: str, model: str, group: int, reply: int, steps: int, folder: Path) -> Any:
    """Of one side: seconds of a step (median, without the first, which warms up), tokens sampled in
    one, tokens of the first prompt, and peak memory."""
    shape = (model, group, reply, steps)
    found = theirs(*shape) if side == "comlrl" else ours(*shape, folder)
    if len(found.times) != steps:
        raise SystemExit(f"{len(found.times)} of {steps} steps were scored")
    laps = [b - a for a, b in zip(found.times, found.times[1:], strict=False)][1:]
    return {
        "seconds": statistics.median(laps),
        "sampled_tokens": statistics.mean(found.sampled[2:]),
        "prompt_tokens": found.prompt_tokens,
        "peak_bytes": memory("VmHWM"),
    }


if __name__ == "__main__":
    side, model, group, reply, steps, folder = sys.argv[1:]
    shape = (model, int(group), int(reply), int(steps), Path(folder))
    print(json.dumps(both(*shape) if side == "both" else one_side(side, *shape)))
