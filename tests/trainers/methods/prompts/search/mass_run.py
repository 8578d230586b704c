"""A MASS run without a model: the offline variant of its method sheet. Reflection repairs half of the
errors if its instruction is right, a debate does nothing, a vote over equal answers neither; a scripted
proposer draws instructions.

`python -m tests.trainers.methods.prompts.search.mass_run FOLDER MODEL` plays one on each rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from marlora.agents.programs.building_blocks import BuildingBlocks
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import Answer, ScriptedEngine
from marlora.trainers.methods.prompts.search.mass import MASSConfig, MASSTrainer
from tests.trainers.methods.prompts.search.mipro_run import MESSAGE, TASKS, unit
from tests.trainers.methods.prompts.search.search_runs import play_one

AGENTS = {"p": "solves", "r": "reflects", "d": "debates", "g": "aggregates"}
START, INSTRUCTED = 0.3, 0.5  # share that the predictor solves at first, and by its instruction
REPAIRED = {True: 0.5, False: 0.1}  # share of errors that reflection repairs: by r's instruction
OPTIMIZER = {
    "max_bootstrapped_demos": 0,
    "num_instructions": 6,
    "num_trials": 5,
    "minibatch_size": 0,
    "data_aware_proposer": False,
    "program_aware_proposer": False,
    "fewshot_aware_proposer": False,
}


def team(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """What the agents and the proposer say."""
    (_, system), *chat = MESSAGE.findall(prompt)[:-1]
    if system.startswith("You write instructions"):
        match = re.search(r"instruction \(system message\) for agent (\w)", prompt)
        assert match
        return f"<INSTRUCTION>{match[1]}: way {derive_seed(sampling.seed) % 4}</INSTRUCTION>"
    agent, asked = system[0], chat[-1][1]
    question = re.search(r"solve (train|eval) \d+", asked)
    assert question
    if agent == "p":
        return solved(question[0], "way 1" in system, asked)
    if agent == "r":
        right = re.search(r"<ANSWER>\n(yes|no)\n", asked)
        assert right
        word = "yes" if right[1] == "yes" else "no"
        return f"repair {REPAIRED['way 2' in system]}\n<CORRECT>{word}</CORRECT>"
    answers = re.findall(r"<ANSWER>\n(yes|no)\n", asked)
    return max(answers, key=answers.count)


def solved(question: str, instructed: bool, asked: str) -> str:
    """The predictor's answer: the first one, or a revised one."""
    share = INSTRUCTED if instructed else START
    feedback = re.search(r"repair ([\d.]+)", asked)
    if feedback:  # of what it solves not at once, this share of the rest
        share += (1 - share) * float(feedback[1])
    return "yes" if unit(question) < share else "no"


def useless(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The same, with a reflector whose feedback repairs nothing."""
    return (
        team(prompt, ref, sampling, k)
        .replace("repair 0.5", "repair 0")
        .replace("repair 0.1", "repair 0")
    )


def trainer(
    folder: Path, model: Path, *, say: Answer = team, engine: Any = None, **changes: Any
) -> MASSTrainer:
    """A predictor, a reflector, a debator and an aggregator."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        helpers={"proposer": {}},
        tasks=TASKS,
        rewards=["exact"],
        num_eval_tasks=30,
        num_val_tasks=20,
        prompt_optimizer=OPTIMIZER,
        num_topologies=3,
        topology_evaluations=2,
        max_completion_length=60,
        max_concurrency=256,
    )
    agents = [AgentSpec(name, role, f"{name}: go", "base") for name, role in AGENTS.items()]
    return MASSTrainer(
        system=BuildingBlocks(agents, reflector="r", debator="d", aggregator="g"),
        args=MASSConfig(**{**small, **changes}),
        engine=engine or ScriptedEngine(say, context=16_384),
    )


if __name__ == "__main__":
    play_one(trainer)
