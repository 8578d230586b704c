"""A swarm of functions: three agents that are mostly right, and three adversaries that all give the
same wrong answer (the offline variant of GPTSwarm's method sheet)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from marlora.agents.patterns.swarm import Swarm
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.gptswarm import GPTSwarmConfig, GPTSwarmTrainer

TRUTHFUL, ADVERSARIES = ("t1", "t2", "t3"), ("a1", "a2", "a3")
OPTIONS = "ABCD"
RIGHT = 0.9  # share of a truthful agent's answers


def swarm(**settings: Any) -> Swarm:
    """The team: 36 possible edges, all on the bare base."""
    prompts = {**dict.fromkeys(TRUTHFUL, "truthful"), **dict.fromkeys(ADVERSARIES, "adversary")}
    agents = [
        AgentSpec(name, prompt=prompt, policy="base", sampling=Sampling(max_tokens=4))
        for name, prompt in prompts.items()
    ]
    return Swarm(agents, heard="{task}", **settings)


def choice_tasks(split: str = "train", count: int = 200) -> list[Task]:
    """Items with four options."""
    items = [f"item {split} {n}" for n in range(count)]
    return [Task(item, item, right(item), "choice", split) for item in items]


def right(item: str) -> str:
    """The option that is right."""
    return OPTIONS[derive_seed("swarm", item) % 4]


def stub(prompt: str, item: str, seed: int) -> str:
    """What an agent with this system prompt answers."""
    answer = right(item)
    if prompt == "adversary":
        return OPTIONS[(OPTIONS.index(answer) + 1) % 4]
    rng = random.Random(seed)
    return answer if rng.random() < RIGHT else rng.choice(OPTIONS.replace(answer, ""))


def scripted(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The same for a scripted engine, which sees a rendered chat."""
    item = prompt.split("<|user|>")[-1].split("<|end|>")[0]
    role = prompt.split("<|system|>")[-1].split("<|end|>")[0]
    return stub(role, item, sampling.seed or 0)


def chance(task: Task, episode: Episode) -> float:
    """A reward that has nothing to do with the episode."""
    return float(derive_seed("chance", episode.id) % 2)


def trainer(folder: Path, model: Path, **changes: Any) -> GPTSwarmTrainer:
    """A run on the scripted engine; of the model only the tokenizer is read."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        max_steps=30,
        tasks_per_step=16,
        num_eval_tasks=60,
        max_concurrency=256,
        save_every=100,
    )
    return GPTSwarmTrainer(
        system=swarm(),
        tasks=choice_tasks(),
        eval_tasks=choice_tasks("eval"),
        rewards=["exact", chance] if "reward_weights" in changes else ["exact"],
        engine=ScriptedEngine(scripted),
        args=GPTSwarmConfig(**{**settings, **changes}),
    )
