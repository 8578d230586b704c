"""Teams of functions to select in: three models with known skills in two places (the offline
variant of LLMSelector's method sheet), and seven agents of known accuracy that rate one another
(DyLAN's)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from marlora.agents.lookup import trusted
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.temporal_network import TemporalNetwork
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.trainers.methods.selection.dylan import DyLANConfig, DyLANTrainer
from marlora.trainers.methods.selection.llmselector import LLMSelectorConfig, LLMSelectorTrainer

# right answers of a model in a place
SKILLS = {"locate": {"A": 0.95, "B": 0.5, "C": 0.6}, "solve": {"A": 0.1, "B": 0.95, "C": 0.6}}
ACCURACY = {f"g{n}": 0.2 + 0.7 * n / 6 for n in range(7)}  # of DyLAN's agents: .2 to .9
OPTIONS = "ABCD"


def unit(*parts: Any) -> float:
    """A number from 0 to 1 that follows from its parts."""
    return derive_seed("selection", *parts) % 10**6 / 10**6


def right(item: str) -> str:
    """The option that is right."""
    return OPTIONS[derive_seed("selection", item) % 4]


@trusted("tasks")
def items(split: str = "train", seed: int = 0, count: int = 100) -> list[Task]:
    """Items with four options."""
    names = [f"{split} {n}" for n in range(count)]
    return [Task(name, name, right(name), "choice", split) for name in names]


def _parts(prompt: str) -> tuple[str, str]:
    """(system message, user message) of a rendered chat of one turn."""
    found = re.search(r"(?:<\|system\|>(.*?)<\|end\|>)?<\|user\|>(.*?)<\|end\|>", prompt, re.DOTALL)
    assert found
    return found[1] or "", found[2]


# LLMSelector


def located_and_solved(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """`locate` finds the row or not, `solve` solves what was found; who says what follows from the
    policy. `diagnose` says whose output is wrong."""
    role, text = _parts(prompt)
    if role == "diagnose":
        return diagnosed(text)
    item = text.removesuffix(":here").removesuffix(":there")
    good = unit(ref.policy, role, item) < SKILLS[role][ref.policy]
    if role == "locate":
        return f"{item}:here" if good else f"{item}:there"
    return right(item) if good and text.endswith(":here") else "X"


def diagnosed(text: str) -> str:
    """The verdict of a diagnoser that knows: locating failed, or it did not and solving failed."""
    module = text.partition("Determine whether MODULE ")[2].partition(" ")[0]
    guilty = "solve" if ":here" in text else "locate"
    return f"Let me see. [final answer: {'Yes' if module == guilty else 'No'}]"


def selector(
    folder: Path, model: Path, *, cls: type[LLMSelectorTrainer] = LLMSelectorTrainer, **changes: Any
) -> LLMSelectorTrainer:
    """A run over three models on the scripted engine; of the model only the tokenizer is read."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={name: {"init": "fresh"} for name in "ABC"},
        tasks="tests.trainers.selectors:items",
        rewards=["exact"],
        num_search_tasks=40,
        num_eval_tasks=40,
        max_completion_length=40,
        max_concurrency=256,
        lora_r=1,
    )
    agents = [AgentSpec(role, prompt=role, policy="C") for role in SKILLS]
    return cls(
        system=Chain(agents, views={"solve": "{previous}"}),
        engine=ScriptedEngine(located_and_solved),
        args=LLMSelectorConfig(**{**settings, **changes}),
    )


# DyLAN


def rated(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """An agent's option, the same at every step (nobody persuades it), and 4 points for each equal
    answer, 2 for another, with noise of -1 to 1."""
    name, text = _parts(prompt)
    item, _, told = text.partition("|")
    others = told.split("\n\n") if told else []
    if name == "judge":
        return best_two(item, others)
    answer = right(item)
    if unit(name, item) >= ACCURACY[name]:
        wrong = OPTIONS.replace(answer, "")
        answer = wrong[int(3 * unit(name, item, "wrong"))]
    points = [
        (4 if other == answer else 2) + int(3 * unit(name, item, sampling.seed, n)) - 1
        for n, other in enumerate(others)
    ]
    return f"{answer} [[{', '.join(map(str, points))}]]" if others else answer


def best_two(item: str, others: list[str]) -> str:
    """A ranking by a judge that knows which answers are right."""
    order = sorted(range(len(others)), key=lambda n: others[n] != right(item))
    return f"[{order[0] + 1}, {order[1] + 1}]"


def network(**settings: Any) -> TemporalNetwork:
    """Seven agents on the bare base, told apart by their prompts."""
    agents = [AgentSpec(name, prompt=name, policy="base") for name in ACCURACY]
    if settings.get("ranker"):
        agents.append(AgentSpec(settings["ranker"], prompt=settings["ranker"], policy="base"))
    told = {"update": "{prompt}|{others}", "quote": "{text}", "rank": "{prompt}|{others}"}
    return TemporalNetwork(agents, **{"steps": 3, **told, **settings})


def dylan(
    folder: Path, model: Path, *, cls: type[DyLANTrainer] = DyLANTrainer, **changes: Any
) -> DyLANTrainer:
    """A run over the seven agents on the scripted engine."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        tasks="tests.trainers.selectors:items",
        rewards=["exact"],
        num_eval_tasks=60,
        max_completion_length=60,
        max_concurrency=256,
        tasks_per_step=20,
        save_every=1,
    )
    team = network(**changes.pop("network", {}))
    return cls(
        system=team, engine=ScriptedEngine(rated), args=DyLANConfig(**{**settings, **changes})
    )
