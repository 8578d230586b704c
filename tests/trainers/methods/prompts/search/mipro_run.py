"""A MIPRO run without a model: the offline variant of its method sheet. Two agents pass a task on,
each adds to the chance that it is solved if its instruction or the number of its demonstrations is
the right one; a scripted proposer draws instructions.

`python -m tests.trainers.methods.prompts.search.mipro_run FOLDER MODEL` plays one on each rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlora.agents.patterns.chain import Chain
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import Answer, ScriptedEngine
from marlora.trainers.methods.prompts.search.mipro import MIPROConfig, MIPROTrainer
from tests.trainers.methods.prompts.search.search_runs import play_one

MESSAGE = re.compile(r"<\|(system|user|assistant)\|>(.*?)(?:<\|end\|>|$)", re.S)
# chance that a task is solved: at first, by an agent's instruction, by the number of its examples
START, INSTRUCTED, SHOWN = 0.3, {"a": ("way 1", 0.25), "b": ("way 2", 0.25)}, {"a": 2, "b": 3}
BONUS = 0.1
TASKS = "tests.trainers.methods.prompts.search.mipro_run:questions"


def unit(*parts: Any) -> float:
    """A number from 0 to 1 that follows from its parts."""
    return derive_seed("mipro", *parts) % 10**6 / 10**6


def questions(split: str = "train", seed: int = 0, count: int = 60) -> list[Task]:
    """Questions that are solved or not."""
    names = [f"{split} {number:02}" for number in range(count)]
    return [Task(name, f"solve {name}", "yes", "questions", split) for name in names]


def chance(agent: str, instruction: str, examples: int) -> float:
    """What an agent adds to the chance."""
    text, much = INSTRUCTED[agent]
    return much * (text in instruction) + BONUS * (examples == SHOWN[agent])


def team(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """What `a` and `b` answer: `a` the question with its share of the chance, `b` whether the
    question is solved. The proposer writes one of four instructions."""
    (_, system), *chat = MESSAGE.findall(prompt)[:-1]
    if system.startswith("You write instructions"):
        return proposed(prompt, sampling)
    agent, asked, examples = system[0], chat[-1][1], len(chat) // 2
    if agent == "a":
        return f"{asked}|{chance('a', system, examples):.2f}"
    question, _, share = asked.partition("|")
    solved = unit(question) < START + float(share) + chance("b", system, examples)
    return "yes" if solved else "no"


def proposed(prompt: str, sampling: Sampling) -> str:
    """What the proposer says: an instruction, or a word about the tasks and the program."""
    match = re.search(r"instruction \(system message\) for agent (\w)", prompt)
    if match is None:
        return "COMPLETE" if "answer only COMPLETE" in prompt else "They are questions."
    return f"<INSTRUCTION>{match[1]}: way {derive_seed(sampling.seed) % 4}</INSTRUCTION>"


def trainer(
    folder: Path,
    model: Path,
    *,
    say: Answer = team,
    engine: Any = None,
    rewards: Sequence[Any] = ("exact",),
    **changes: Any,
) -> MIPROTrainer:
    """Four sets of demonstrations and up to four instructions per agent, twelve trials."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        helpers={"proposer": {}},
        tasks=TASKS,
        num_eval_tasks=30,
        num_val_tasks=24,
        num_candidates=4,
        num_instructions=5,
        num_trials=12,
        minibatch_size=10,
        full_eval_steps=4,
        max_bootstrapped_demos=3,
        max_labeled_demos=0,
        max_summary_calls=2,
        max_completion_length=60,
        max_concurrency=256,
    )
    agents = [AgentSpec(name, f"agent {name}", f"{name}: go", "base") for name in "ab"]
    return MIPROTrainer(
        system=Chain(agents, views={"a": "{prompt}", "b": "{previous}"}),
        rewards=list(rewards),
        args=MIPROConfig(**{**small, **changes}),
        engine=engine or ScriptedEngine(say, context=16_384),
    )


if __name__ == "__main__":
    play_one(trainer)
