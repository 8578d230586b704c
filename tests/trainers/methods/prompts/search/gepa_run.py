"""A GEPA run without a model: two agents pass a task on; each solves the kinds of task that its
instruction names, and `b` only the last three, so that no candidate is best on all. The scripted
reflector adds the kind of
the first example that it is shown to have failed.

`python -m tests.trainers.methods.prompts.search.gepa_run FOLDER MODEL` plays one on each rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from marlora.agents.patterns.chain import Chain
from marlora.agents.seeds import derive_seed
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import Answer, ScriptedEngine
from marlora.trainers.methods.prompts.search.gepa_prompts import GEPAConfig, GEPATrainer
from tests.trainers.methods.prompts.search.mipro_run import MESSAGE
from tests.trainers.methods.prompts.search.search_runs import play_one

KINDS = "rstuv"
KNOWN = {"a": 5, "b": 3}  # of an instruction's kinds the last ones, which an agent remembers
TASKS = "tests.trainers.methods.prompts.search.gepa_run:kinds"


def kinds(split: str = "train", seed: int = 0, count: int = 60) -> list[Task]:
    """Tasks of five kinds; both agents have to know a kind."""
    names = [f"{split} {KINDS[number % 5]}{number:02}" for number in range(count)]
    return [Task(name, f"solve {name}", "yes", "kinds", split) for name in names]


def team(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """`a` says whether it knows the kind, `b` whether both do; the reflector writes."""
    (_, system), *chat = MESSAGE.findall(prompt)[:-1]
    if system.startswith("You write instructions"):
        return reflected(chat[-1][1])
    asked = chat[-1][1]
    kind = re.search(r"(?:train|eval) ([a-z])\d+", asked)
    assert kind
    knows = kind[1] in known(system)
    if system.startswith("a"):
        return f"{asked}|{'known' if knows else 'unknown'}"
    return "yes" if knows and asked.endswith("|known") else "no"


def known(instruction: str) -> str:
    """The kinds that an agent knows by this instruction."""
    return instruction.partition("knows ")[2][-KNOWN[instruction[0]] :]


def reflected(asked: str) -> str:
    """The instruction with the kind of the first example that failed; the agent is the one that the
    examples are of."""
    now = re.search(r"<CURRENT_INSTRUCTION>\n(.*?)\n</CURRENT", asked, re.S)
    assert now
    shown = re.findall(r"<EXAMPLE>\n(.*?)</EXAMPLE>", asked, re.S)
    failed = [re.findall(r"(?:train|eval) ([a-z])\d+", e)[0] for e in shown if "Score: 0" in e]
    missing = [kind for kind in failed if kind not in known(now[1])]
    new = now[1] + (missing[0] if missing else "")
    return f"<INSTRUCTION>{new}</INSTRUCTION>"


def blind(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """The same, with a reflector that does not look: it adds kinds that there are none of."""
    if "You write instructions" in prompt:
        now = re.search(r"<CURRENT_INSTRUCTION>\n(.*?)\n</CURRENT", prompt, re.S)
        assert now
        return f"<INSTRUCTION>{now[1]}{'xyzuvw'[derive_seed(prompt) % 6]}</INSTRUCTION>"
    return team(prompt, ref, sampling, k)


def trainer(
    folder: Path, model: Path, *, say: Answer = team, engine: Any = None, **changes: Any
) -> GEPATrainer:
    """`a` knows four kinds at first, `b` one. Twelve iterations."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        helpers={"reflector": {}},
        tasks=TASKS,
        rewards=["exact"],
        num_eval_tasks=20,
        num_val_tasks=20,
        num_proposals=12,
        reflection_minibatch_size=4,
        max_completion_length=60,
        max_concurrency=256,
    )
    agents = [AgentSpec("a", "agent a", "a knows rstu", "base")]
    agents.append(AgentSpec("b", "agent b", "b knows r", "base"))
    return GEPATrainer(
        system=Chain(agents, views={"a": "{prompt}", "b": "{previous}"}),
        args=GEPAConfig(**{**small, **changes}),
        engine=engine or ScriptedEngine(say, context=16_384),
    )


if __name__ == "__main__":
    play_one(trainer)
