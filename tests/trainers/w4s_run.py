"""W4S on a tiny random model into whose mouth words are put: a designer with a list of replies, and
executors that are right in half of their answers. And what each of two ranks does: `torchrun
--nproc_per_node N -m tests.trainers.w4s_run FOLDER MODEL`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marlora.agents.programs.program import Program
from marlora.agents.transcript import Call
from marlora.agents.types import AgentSpec, Completion, Sampling
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.imitation.w4s import W4SConfig, W4STrainer
from tests.trainers.searches import FIRST, executed

Design = Callable[[str, int], str]  # the chat and the number of the sibling -> a reply
BROKEN = 'await custom("Think.")\n[1][2]'
REPAIR = "cannot be used"


def vote(count: int) -> str:
    """A program that votes over so many answers: the more, the more often it is right."""
    return f"await ensemble([await custom(str(n)) for n in range({count})])"


def fenced(program: str, thought: str = "Better so:") -> str:
    return f"{thought}\n```python\n{program}\n```"


def designs(chat: str, k: int) -> str:
    """Per turn: the first program again, two votes, one that breaks, and no program at all; the
    last two are repaired to votes."""
    first = 2 * chat.partition(REPAIR)[0].count("Feedback:") + 3
    if REPAIR in chat:
        return fenced(vote(first + 2 if "[1][2]" in chat else first), "Sorry.")
    replies = [FIRST, vote(first), vote(first + 1), BROKEN]
    return fenced(replies[k]) if k < len(replies) else "I know nothing better."


class Saying(EngineCompleter):
    """Speaks these words, in the tokens and on the prompt of the real speaker."""

    design: Design = staticmethod(designs)

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        await asyncio.sleep(0)
        prompt = self.prompt(call)
        return [self._written(prompt, call, version, k) for k in range(call.n)]

    def _written(self, prompt: Any, call: Call, version: str, k: int) -> Completion:
        chat = "\n".join(message.content for message in call.messages)
        last = call.messages[-1].content
        text = self.design(chat, k) if call.agent.name == "designer" else executed(last)
        done = self.tokens.write(prompt, text)
        logprobs = (-1.0,) * len(done.token_ids)
        return dataclasses.replace(done, logprobs=logprobs, policy=self.policy, version=version)


def trainer(folder: Path, model: Path, **changes: Any) -> W4STrainer:
    """A run of small settings."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="tests.trainers.searches:numbers",
        rewards=["exact"],
        num_val_tasks=8,
        num_eval_tasks=4,
        num_episodes=1,
        examples=[],
        num_cases=2,
        instruction="{archive}\n{cases}\nImprove it.",
        feedback="Feedback: {accuracy} {trend} {previous}, {cases_right} of {num_cases}",
        repair="It cannot be used: {fault}",
        max_completion_length=20,
        lora_r=4,
        lora_target_modules=["q_proj", "v_proj"],
        learning_rate=1e-2,
    )
    team, executor = changes.pop("team", {}), changes.pop("executor", "base")
    agents = [
        AgentSpec("executor", "names a digit", "execute", policy=executor),
        AgentSpec("designer", "writes programs", "design", sampling=Sampling(max_tokens=300)),
    ]
    system = Program(agents, **{"program": FIRST, "seconds": 0.3, **team})
    return W4STrainer(system=system, args=W4SConfig(**{**settings, **changes}))


def put_words(made: W4STrainer, design: Design = designs) -> W4STrainer:
    """Open the run and let its agents say these words."""
    run = made.run.open()
    if not run.ranks.main:
        return made
    spoken: dict[str, Any] = {}
    for policy, real in run.rollouts.runner.completers.items():
        spoken[policy] = real  # of an outside model
        if isinstance(real, EngineCompleter):
            spoken[policy] = Saying(real.engine, real.tokens, policy)
            spoken[policy].design = design
    run.rollouts.runner = dataclasses.replace(run.rollouts.runner, completers=spoken)
    return made


def w4s(folder: Path, model: Path, design: Design = designs, **changes: Any) -> W4STrainer:
    """A run of these words, ready to train."""
    return put_words(trainer(folder, model, **changes), design)


def learned(folder: Path, model: Path) -> dict[str, Any]:
    """Archive, memory, values and adapter after two iterations, in batches small enough for two
    ranks."""
    made = w4s(folder, model, num_fits=2, tokens_per_batch=900)
    made.train()
    (base,) = made.run.learner.bases.values()
    return {
        "values": dict(made.run.values),
        "parts": [part.state_dict() for part in (made.search, made.memory)],
        "sha256": base.adapters.sha256("designer"),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    came = learned(folder, model)
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(came), encoding="utf-8")
