"""ScoreFlow runs on a tiny random model into whose mouth programs are put."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from marlora.agents.programs.workflow import Workflow
from marlora.agents.transcript import Call
from marlora.agents.types import Completion
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.tasks.toy import digit, program_tasks
from marlora.trainers.methods.preference.scoreflow import ScoreFlowConfig, ScoreFlowTrainer
from tests.trainers import small_run
from tests.trainers.tiny_workflow import tiny_workflow

WRITTEN = [
    'await custom("A")',
    'await custom("B")',
    'await custom("C")',
    "await magic('A')",
    'while True:\n  await custom("A")\n1',
]


def said(call: Call) -> str:
    """A designer's program by the seed of the call, the second task's always the same; an
    executor's digit, wrong where the seed says."""
    seed, text = call.sampling.seed or 0, call.messages[-1].content
    if call.agent.name == "designer":
        return WRITTEN[seed % len(WRITTEN)]
    right = digit(text[0].lower(), text)
    return right if seed % 3 else str((int(right) + 1) % 10)


class Saying(EngineCompleter):
    """Speaks these words, in the tokens and on the prompt of the real speaker."""

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        await asyncio.sleep(0)
        made = self.tokens.write(self.prompt(call), said(call))
        return [
            dataclasses.replace(
                made, logprobs=(-1.0,) * len(made.token_ids), policy=self.policy, version=version
            )
        ] * call.n


def put_words(made: ScoreFlowTrainer) -> ScoreFlowTrainer:
    """Open the run and let its agents say what `said` says."""
    run = made.run.open()
    spoken = {
        p: Saying(s.engine, s.tokens, p)
        for p, s in run.rollouts.runner.completers.items()
        if isinstance(s, EngineCompleter)
    }
    run.rollouts.runner = dataclasses.replace(run.rollouts.runner, completers=spoken)
    return made


def trainer(
    folder: Path, model: Path, system: Workflow | None = None, **changes: Any
) -> ScoreFlowTrainer:
    small = {
        f.name: getattr(small_run.config(folder, model), f.name)
        for f in dataclasses.fields(small_run.GRPOConfig)
    }
    known = {f.name for f in dataclasses.fields(ScoreFlowConfig)} - {"beta", "loss_type"}
    fields = {n: v for n, v in small.items() if n in known} | {
        "max_steps": 1,
        "tasks_per_step": 3,
        "num_generations": 6,
        "num_pairs": 12,
        "num_eval_tasks": 2,
    }
    args = ScoreFlowConfig(**{**fields, **changes})
    return ScoreFlowTrainer(
        system=system or tiny_workflow(seconds=0.5),
        tasks=program_tasks()[:12],
        eval_tasks=program_tasks("eval")[:2],
        rewards=["exact"],
        args=args,
    )


async def nobody(call: Call, version: str) -> list[Completion]:
    raise AssertionError(f"{call.agent.name} is asked in a replay")


def words_put(folder: Path, model: Path, **changes: Any) -> ScoreFlowTrainer:
    """An opened run of two rounds in which no program depends on how fast the machine is."""
    WRITTEN[:] = [text for text in WRITTEN if "while" not in text]
    small = {"max_steps": 2, "num_generations": 3, "num_pairs": 4}
    return put_words(trainer(folder, model, tiny_workflow(seconds=20.0), **{**small, **changes}))
