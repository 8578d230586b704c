"""A supernet of functions: easy queries that one quick answer settles, and hard ones that need a
second look (the offline variant of MaAS's method sheet)."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from marlora.agents.programs.supernet import Supernet
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.maas import MaASConfig, MaASTrainer

# share of right answers, by what is asked and the kind of the query
RIGHT = {("quick", "easy"): 0.97, ("quick", "hard"): 0.3, ("panel", "easy"): 0.75}
RIGHT |= {("panel", "hard"): 0.75, ("revise", "easy"): 0.9, ("revise", "hard"): 0.9}
OPERATORS = {"quick": "generate", "panel": "self_consistency", "refine": "self_refine"}
PROMPTS = {
    "quick": "quick {problem}",
    "panel": "panel {problem}",
    "review": "review {problem}: {solution}",
    "revise": "revise {problem}: {solution}, since {feedback}",
}


def supernet(**settings: Any) -> Supernet:
    """Quick (1 call), a panel of five (5 calls), and a refinement of a solution (1 to 4 calls), in
    two layers."""
    agent = AgentSpec("solver", policy="base", sampling=Sampling(max_tokens=4))
    given: dict[str, Any] = {"operators": OPERATORS, "prompts": PROMPTS, "layers": 2}
    return Supernet([agent], **{**given, **settings})


def queries(split: str = "train", count: int = 200) -> list[Task]:
    """Easy and hard queries; each has an answer of one digit."""
    kinds = ("easy", "hard")
    found = [f"{kinds[n % 2]} {split}{n}" for n in range(count)]
    return [
        Task(item, item, answer_to(item), "queries", split, {"kind": item.split()[0]})
        for item in found
    ]


def answer_to(query: str) -> str:
    return str(derive_seed("supernet", query) % 10)


def reply(text: str, seed: int) -> str:
    """What the solver says to the last message of a chat."""
    asked, kind, name, solution = re.match(r"(\w+) (\w+) (\w+)(?:: (\d))?", text).groups()  # type: ignore[union-attr]
    right = answer_to(f"{kind} {name}")
    if asked == "review":
        return "RIGHT" if solution == right else "no"
    rng = random.Random(seed)
    wrong = [digit for digit in "0123456789" if digit != right]
    return right if rng.random() < RIGHT[asked, kind] else rng.choice(wrong)


def scripted(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The same for a scripted engine, which sees a rendered chat."""
    return reply(prompt.split("<|user|>")[-1].split("<|end|>")[0], sampling.seed or 0)


def chance(task: Task, episode: Episode) -> float:
    """A reward that has nothing to do with the episode."""
    return float(derive_seed("chance", episode.id) % 2)


def trainer(folder: Path, model: Path, **changes: Any) -> MaASTrainer:
    """A run on the scripted engine; of the model only the tokenizer is read."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        max_steps=40,
        tasks_per_step=8,
        num_eval_tasks=60,
        max_concurrency=256,
        save_every=100,
        weights="utility",
        cost_unit="calls",
        cost_weight=0.1,
    )
    return MaASTrainer(
        system=supernet(),
        tasks=queries(),
        eval_tasks=queries("eval"),
        rewards=["exact", chance] if "reward_weights" in changes else ["exact"],
        engine=ScriptedEngine(scripted),
        args=MaASConfig(**{**settings, **changes}),
    )
