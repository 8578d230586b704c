"""Searches over programs on functions: executors that are right in half of their answers, one per
instruction and task; a vote that knows no answer; and proposers that know what to write."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from marlora.agents.lookup import trusted
from marlora.agents.programs.program import Program
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.trainers.methods.workflow_search.aflow import AFlowConfig, AFlowTrainer
from marlora.trainers.methods.workflow_search.workflow_search import (
    WorkflowSearchConfig,
    WorkflowSearchTrainer,
)

FIRST = 'await custom("Think.")'
SKILL = 0.55  # right answers of an executor
T = TypeVar("T", bound=WorkflowSearchTrainer[Any])
Propose = Callable[[str, str], str]  # (system message, prompt) -> reply


@trusted("tasks")
def numbers(split: str = "train", seed: int = 0, count: int = 60) -> list[Task]:
    """Tasks with a digit as their answer."""
    names = [f"{split} {n}" for n in range(count)]
    return [Task(name, name, digit("answer", name), "number", split) for name in names]


def digit(*parts: Any) -> str:
    return str(derive_seed("search", *parts) % 10)


def executed(text: str, skill: float = SKILL) -> str:
    """An executor's reply: `custom` is right in a share of its answers, which follow from problem
    and instruction; `ensemble` names the most frequent solution; `review` and `revise` know nothing
    more."""
    problem, _, rest = text.partition("\n\n")
    if rest.startswith("Several solutions"):
        options = re.findall(r"^([A-Z]): (\d)", rest, re.MULTILINE)
        best = Counter(value for _, value in options).most_common(1)[0][0]
        return next(letter for letter, value in options if value == best)
    right = derive_seed("search", problem, rest) % 1000 < 1000 * skill
    return digit("answer", problem) if right else digit("wrong", problem, rest)


def reply_with(modification: str, graph: str, prompt: str = "") -> str:
    """A proposer's reply in AFlow's format."""
    fields = {"modification": modification, "graph": graph, "prompt": prompt}
    return "Well.\n" + "\n".join(f"<{k}>\n{v}\n</{k}>" for k, v in fields.items())


def parts_of(prompt: str) -> tuple[str, str]:
    """(system message, the first user message) of a rendered chat."""
    found = re.search(r"(?:<\|system\|>(.*?)<\|end\|>)?<\|user\|>(.*?)<\|end\|>", prompt, re.DOTALL)
    assert found
    return found[1] or "", found[2]


def engine(propose: Propose, skill: float = SKILL) -> ScriptedEngine:
    """Executors and a proposer."""

    def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        role, text = parts_of(prompt)
        return executed(text, skill) if role == "execute" else propose(role, prompt)

    return ScriptedEngine(answer, context=100_000)


def one_of(*edits: str) -> Propose:
    """A proposer with a list of replies: the first whose modification its prompt does not name."""

    def propose(role: str, prompt: str) -> str:
        for edit in edits:
            found = re.search(r"<modification>\s*(.*?)\s*</modification>", edit, re.DOTALL)
            if found and f" {found[1]}" not in prompt:
                return edit
        return edits[-1]

    return propose


def larger_ensemble(role: str, prompt: str) -> str:
    """A proposer that knows: two more voters than the parent has, each with its own prompt."""
    graph = prompt.split("<graph>")[1].partition("</graph>")[0]
    count = min(graph.count("custom(") + 2, 7)
    names = [f"WAY_{n}" for n in range(count)]
    calls = ", ".join(f"await custom({name})" for name in names)
    prompts = "\n".join(f'{name} = "Solve it by way {n}."' for n, name in enumerate(names))
    return reply_with(f"ensemble of {count}", f"await ensemble([{calls}])", prompts)


def random_words(role: str, prompt: str) -> str:
    """A proposer that knows nothing: another instruction."""
    word = derive_seed("random", prompt) % 10**6
    return reply_with(f"the word {word}", f'await custom("{word}")')


def search(
    folder: Path,
    model: Path,
    propose: Propose,
    *,
    cls: type[WorkflowSearchTrainer[Any]] = AFlowTrainer,
    config: type[WorkflowSearchConfig] = AFlowConfig,
    helpers: Sequence[str] = ("proposer",),
    team: dict[str, Any] | None = None,
    skill: float = SKILL,
    **changes: Any,
) -> Any:
    """A run on the scripted engine; of the model only the tokenizer is read."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        helpers={name: {"prompt": name} for name in helpers},
        tasks="tests.trainers.searches:numbers",
        rewards=["exact"],
        num_val_tasks=6,
        num_eval_tasks=4,
        max_steps=3,
        max_completion_length=20,
        max_concurrency=64,
    )
    agents = [AgentSpec("executor", prompt="execute", policy="base")]
    system = Program(agents, **{"program": FIRST, "seconds": 0.3, **(team or {})})
    return cls(system=system, engine=engine(propose, skill), args=config(**{**settings, **changes}))
