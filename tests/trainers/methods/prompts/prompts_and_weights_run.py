"""Small runs of prompts and weights: one that searches prompts on an engine that says the digit of
its prompt, and one that learns both on a tiny model.

`python -m tests.trainers.methods.prompts.prompts_and_weights_run FOLDER MODEL URL` plays the second
on each rank, which writes what it ends with to FOLDER.rankN.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.agents.patterns.chain import Chain
from marlora.agents.state import TeamState
from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.prompts_and_weights import (
    PromptsAndWeightsConfig,
    PromptsAndWeightsTrainer,
)
from marlora.trainers.testbeds.rules import rule_chain

REPLY = 6  # tokens of a reply at most


class Cut(BaseException):
    """Stands for a kill."""


def played(name: str, prompt: str, task: str, reward: float) -> Episode:
    """An episode of agent `a` under a prompt, in the group of its task and prompt."""
    turn = Turn(
        index=0,
        agent="a",
        messages=(Message("system", prompt), Message("user", f"asked {task}")),
        text=f"reply {name}",
        policy="a",
        prompt_ids=(1, 2),
        token_ids=(3,),
        logprobs=(-1.0,),
    )
    rewards = () if math.isnan(reward) else (Reward("exact", reward),)
    return Episode(
        id=name,
        group=f"{prompt}/{task}",
        task=Task(task, f"asked {task}", "gold"),
        seed=0,
        state=TeamState(values={"a.prompt": prompt}),
        turns=(turn,),
        rewards=rewards,
    )


EPISODES = [
    *(played(f"x{n}", "x", "t", reward) for n, reward in enumerate([1.0, 0.0])),
    *(played(f"x{n + 2}", "x", "u", reward) for n, reward in enumerate([0.0, 0.0])),
    *(played(f"y{n}", "y", "t", reward) for n, reward in enumerate([1.0, 1.0])),
    *(played(f"y{n + 2}", "y", "u", reward) for n, reward in enumerate([1.0, math.nan])),
]


def digit(text: str) -> str:
    return next((c for c in reversed(text) if c.isdigit()), "0")


def said(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
    """An agent says the last digit of its system message (0 without one); the helper writes one
    more than the best candidate's."""
    if "Write a better instruction" in prompt:
        best = prompt.partition("</INSTRUCTION>")[0].rpartition("<INSTRUCTION>")[2]
        return f"<INSTRUCTION>say {min(int(digit(best)) + 1, 3)}</INSTRUCTION>"
    return digit(prompt.partition("<|user|>")[0])


def search(
    folder: Path, model: Path, speak: Any = said, **changes: Any
) -> PromptsAndWeightsTrainer:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={"solver": {"trainable": False}},
        helpers={"proposer": {}},
        tasks="tests.trainers.state_tasks:digits",
        rewards=["tests.trainers.state_tasks:worth"],
        num_val_tasks=4,
        max_steps=4,
        round_steps=1,
        tasks_per_step=2,
        num_generations=4,
        max_completion_length=REPLY,
        max_proposal_tokens=60,
        save_every=1,
    )
    return PromptsAndWeightsTrainer(
        system=Chain(["solver"]),
        args=PromptsAndWeightsConfig(**{**settings, **changes}),
        engine=ScriptedEngine(speak),
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def loud(task: Task, episode: Episode) -> float:
    """A score that no model has learnt and that differs between replies."""
    return sum(str(episode.output).encode()) % 7 / 6


def both(
    folder: Path, model: Path | str, url: str, system: Chain | None = None, **changes: Any
) -> PromptsAndWeightsTrainer:
    """Two agents with an adapter each on a random tiny model."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="marlora.rollouts.tasks.toy:rule_tasks",
        rewards=["tests.trainers.methods.prompts.prompts_and_weights_run:loud"],
        helpers={"proposer": {"url": url, "base": "stand-in"}},
        num_eval_tasks=4,
        num_val_tasks=4,
        gate="always",
        max_steps=3,
        round_steps=1,
        tasks_per_step=2,
        num_generations=4,
        max_completion_length=3,
        max_proposal_tokens=40,
        shown_episodes=1,
        lora_r=2,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
        save_total_limit=9,
        proof_every=9,
    )
    return PromptsAndWeightsTrainer(
        system=system or rule_chain({"first": "first", "last": "last"}),
        args=PromptsAndWeightsConfig(**{**settings, **changes}),
    )


def adapters(made: PromptsAndWeightsTrainer) -> dict[str, str]:
    """Hash of every adapter."""
    (base,) = made.run.learner.bases.values()
    return {policy: base.adapters.sha256(policy) for policy in base.policies}


def main() -> None:
    torch.set_num_threads(1)
    made = both(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    made.train()
    ended = {
        "values": made.run.values,
        "adapters": adapters(made),
        "candidates": [dict(each.values) for each in made.search.candidates],
        "memory": made.memory.state_dict(),
    }
    Path(f"{sys.argv[1]}.rank{made.run.ranks.rank}.json").write_text(
        json.dumps(ended), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
