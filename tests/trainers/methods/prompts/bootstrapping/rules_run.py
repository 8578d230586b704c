"""A bootstrapping run without a model: a scripted engine answers as the teacher of `tiny-rules`
does, right only if its chat holds worked examples of the rule.

`python -m tests.trainers.methods.prompts.bootstrapping.rules_run FOLDER MODEL [AT]` plays one, which a SIGKILL ends
inside the `AT`-th call; each rank writes how it ended to FOLDER.rankN.json.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import Answer, ScriptedEngine
from marlora.rollouts.tasks.toy import rule_tasks
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_few_shot import (
    BootstrapFewShotConfig,
    BootstrapFewShotTrainer,
)
from marlora.trainers.testbeds.rules import answer, rule_chain

MESSAGE = re.compile(r"<\|(system|user|assistant)\|>(.*?)(?:<\|end\|>|$)")


def chat_of(prompt: str) -> list[str]:
    """The messages of a prompt: system, then user and assistant in turn; without the empty one that
    the agent has to fill."""
    return [content for _, content in MESSAGE.findall(prompt)][:-1]


def teacher(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The digit that the teacher of `tiny-rules` says to a prompt: at temperature 0 its likeliest,
    else one drawn by the request's seed."""
    role, *texts = chat_of(prompt)
    examples = [(int(q[-1]), int(a)) for q, a in zip(texts[0:-1:2], texts[1::2], strict=True)]
    chances = answer(role, int(texts[-1][-1]), examples)
    if sampling.temperature == 0:
        return str(max(range(10), key=chances.__getitem__))
    return str(random.Random((sampling.seed or 0) + k).choices(range(10), chances)[0])


def trainer(
    folder: Path,
    model: Path,
    *,
    say: Answer = teacher,
    engine: Any = None,
    rewards: Sequence[Any] = ("exact",),
    num_tasks: int = 60,
    **changes: Any,
) -> BootstrapFewShotTrainer:
    """Two shuffled candidates of up to three demonstrations, compared on twenty tasks."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        num_val_tasks=20,
        num_candidate_programs=2,
        max_bootstrapped_demos=3,
        max_rounds=4,
        max_completion_length=3,
    )
    return BootstrapFewShotTrainer(
        system=rule_chain(),
        tasks=rule_tasks()[:num_tasks],
        eval_tasks=rule_tasks("eval")[:20],
        rewards=list(rewards),
        args=BootstrapFewShotConfig(**{**small, **changes}),
        engine=engine or ScriptedEngine(say),
    )


def killed_at(call: int) -> Answer:
    """The teacher, until this call."""
    calls = [0]

    def say(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return teacher(prompt, ref, sampling, k)

    return say


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, weights, at = Path(sys.argv[1]), Path(sys.argv[2]), int((*sys.argv, "0")[3])
    made = trainer(folder, weights, say=killed_at(at) if at else teacher)
    made.train()
    ended = {"values": made.run.values, "archive": made.search.state_dict()}
    Path(f"{folder}.rank{made.run.ranks.rank}.json").write_text(json.dumps(ended))
