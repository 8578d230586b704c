"""A supernet of functions: easy queries that one quick answer settles, and hard ones that need a
second look (the offline variant of MaAS's method sheet)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlora.agents.programs.operators import Operator
from marlora.agents.programs.solvers import self_consistency
from marlora.agents.programs.supernet import VALUE, Layers, Supernet
from marlora.agents.seeds import derive_seed
from marlora.agents.state import TeamState
from marlora.agents.testing import fake_team
from marlora.agents.text.ngrams import ngrams
from marlora.agents.types import AgentSpec, Reward, Sampling, Task, Usage
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.maas import (
    MaASConfig,
    MaASTrainer,
    by_kind,
    learn_controller,
)
from marlora.trainers.values.controller import Controller

PANEL = Operator(self_consistency, 3, lambda: "1")

# share of right answers, by what is asked and the kind of the query
RIGHT = {("quick", "easy"): 0.97, ("quick", "hard"): 0.3, ("panel", "easy"): 0.75}
RIGHT |= {("panel", "hard"): 0.75, ("revise", "easy"): 0.9, ("revise", "hard"): 0.9}
OPERATORS = {"quick": "generate", "panel": f"{__name__}:PANEL", "refine": "self_refine"}
PROMPTS = {
    "quick": "quick {problem}",
    "panel": "panel {problem}",
    "review": "review {problem}: {solution}",
    "revise": "revise {problem}: {solution}, since {feedback}",
}


def few(text: str) -> list[float]:
    """Sixteen numbers of a text, for a small controller."""
    found = ngrams(text)
    return [sum(found[place::16]) for place in range(16)]


def supernet(**settings: Any) -> Supernet:
    """Quick (1 call), a panel of three (3 calls), and a refinement of a solution (1 to 4 calls), in
    two layers."""
    agent = AgentSpec("solver", policy="base", sampling=Sampling(max_tokens=4))
    given: dict[str, Any] = {"operators": OPERATORS, "prompts": PROMPTS, "layers": 2}
    given |= {"encoder": f"{__name__}:few", "hidden": 16}
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


# without a run: what the functions do, played by a table


def outcome(query: str, layers: Layers, rng: random.Random) -> tuple[float, int]:
    """(1 if the answer is right, calls) of the operators drawn, as the functions above give it; of
    several in a layer a random one counts."""
    kind, right, calls = query.split()[0], False, 0
    for names in layers:
        found = []
        for name in names:
            if name == "panel":
                calls += 3
                found.append(sum(rng.random() < RIGHT["panel", kind] for _ in range(3)) >= 2)
            elif name == "quick":
                calls += 1
                found.append(rng.random() < RIGHT["quick", kind])
            elif name == "refine":
                calls += 1 if right else 3
                found.append(right or rng.random() < RIGHT["revise", kind])
        right = rng.choice(found) if found else right
    return float(right), calls


def drawn(system: Supernet, values: Mapping[str, Any], task: Task, name: str) -> Episode:
    """An episode of the table."""
    seed = derive_seed("supernet", name)
    team = fake_team(system.specs, lambda *_: "", values, seed=seed)
    right, calls = outcome(task.prompt, system.draw(task.prompt, team), random.Random(seed))
    return Episode(
        name,
        task.id,
        task,
        state=TeamState(values=values),
        decisions=tuple(team.decisions),
        rewards=(Reward("exact", right), Reward("chance", float(seed % 2))),
        usage={"solver": Usage(calls=calls)},
    )


def learn(system: Supernet, steps: int, seed: int, **settings: Any) -> Controller:
    """A controller after so many steps of four systems for each of six queries."""
    given: dict[str, Any] = {
        "cost_unit": "calls",
        "weights": "utility",
        "learning_rate": 0.005,
        "reward_weights": {"exact": 1.0},
    }
    args = MaASConfig(**{**given, **settings})
    controller = Controller(VALUE, system.shape, args.learning_rate, seed)
    rng, tasks = random.Random(seed), queries()
    for step in range(steps):
        values = dict(controller.values())
        episodes = [
            drawn(system, values, task, f"{seed}.{step}/{task.id}/{k}")
            for task in rng.sample(tasks, 6)
            for k in range(args.num_generations)
        ]
        learn_controller(controller, system, episodes, args)
    return controller


def measured(system: Supernet, controller: Controller, count: int = 60) -> dict[str, Any]:
    """What a controller does with held-out queries, drawn as in training (`by_kind`)."""
    values, tasks = dict(controller.values()), queries("eval", count)
    episodes = [
        drawn(system, values, task, f"eval/{task.id}/{k}") for task in tasks for k in (0, 1)
    ]
    return by_kind(system, episodes, "exact", MaASConfig(cost_unit="calls"))
