"""MAS-GPT runs on a tiny random model into whose mouth words are put: a pool of four systems, one
of which crashes, and a helper that does everything that a helper can do."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path
from typing import Any

from marlora.agents.programs.mas_gpt import MASGPT
from marlora.agents.transcript import Call
from marlora.agents.types import Completion
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.tasks.toy import digit, program_tasks
from marlora.trainers.methods.imitation.mas_gpt.mas_gpt import MASGPTConfig, MASGPTTrainer
from marlora.trainers.testbeds.programs import WORKFLOW

POOL = {  # executors are right about the kind that they are asked for, and wrong if in doubt
    "a": 'await custom("A")',
    "b": 'await custom("B")',
    "doubt": 'await custom("A?")',
    "crash": 'await custom("A")\n1 // 0',
}


def system(**settings: Any) -> MASGPT:
    """A designer with a policy of its own; the executor is the base."""
    own = {"tag": "```python", "fallback": 'await custom("A")', "seconds": 20.0}
    return MASGPT(**{**WORKFLOW, **own, **settings})


def refine(query: str, program: str) -> str:
    """The helper's reply to a query and its system: worse, as good or better, of another
    structure, or without reasoning."""
    kind, even = query[0], int(query[-1]) % 2 == 0
    if kind == "a":
        new = program.replace('"A"', '"A?"' if even else '"A!"')
    elif kind == "b":
        new = f"{program}\n{program}" if even else program
    else:
        new = program.replace('"A"', '"C"' if even else '"B"')
    reason = "" if (kind, even) == ("b", False) else f"{query} needs care"
    return f"<REASONING>{reason}</REASONING>\n<PROGRAM>\n{new}\n</PROGRAM>"


def said(call: Call) -> str:
    """A designer knows no fence; an executor gives the digit of its instruction's kind."""
    text = call.messages[-1].content
    if call.agent.name == "designer":
        return "no idea"
    if call.agent.name == "refiner":
        query = re.findall(r"<QUERY>\n(.*?)\n</QUERY>", text, re.DOTALL)[-1]
        program = re.findall(r"<SYSTEM>\n(.*?)\n</SYSTEM>", text, re.DOTALL)[-1]
        return refine(query, program)
    right = digit(text[0].lower(), text)
    return str((int(right) + 5) % 10) if "?" in text else right


class Saying(EngineCompleter):
    """Speaks these words, in the tokens and on the prompt of the real speaker."""

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        await asyncio.sleep(0)
        made = self.tokens.write(self.prompt(call), said(call))
        logprobs = (-1.0,) * len(made.token_ids)
        spoken = dataclasses.replace(
            made, logprobs=logprobs, policy=self.policy, version=version, usage=None
        )
        return [spoken] * call.n


def put_words(made: MASGPTTrainer) -> MASGPTTrainer:
    """Open the run and let its agents say what `said` says; on rank 0, which plays."""
    run = made.run.open()
    if run.ranks.rank:
        return made
    spoken = {
        p: Saying(s.engine, s.tokens, p)
        for p, s in run.rollouts.runner.completers.items()
        if isinstance(s, EngineCompleter)
    }
    run.rollouts.runner = dataclasses.replace(run.rollouts.runner, completers=spoken)
    return made


def trainer(
    folder: Path,
    model: Path,
    *,
    cls: type[MASGPTTrainer] = MASGPTTrainer,
    team: MASGPT | None = None,
    refiner: bool = False,
    **changes: Any,
) -> MASGPTTrainer:
    """A run on tasks of three kinds; the pool knows two of them."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        pool=dict(POOL),
        cluster_by=["kind"],
        reasoning="{cluster} by {system}",
        helpers={"refiner": {}} if refiner else {},
        tasks_per_step=12,
        num_train_epochs=1,
        train_batch_size=4,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
    )
    return cls(
        system=team or system(),
        tasks=program_tasks()[:12],
        eval_tasks=program_tasks("eval")[:3],
        rewards=["exact"],
        args=MASGPTConfig(**{**settings, **changes}),
    )


def words_put(folder: Path, model: Path, **changes: Any) -> MASGPTTrainer:
    """An opened run in which agents say what `said` says."""
    return put_words(trainer(folder, model, **changes))
