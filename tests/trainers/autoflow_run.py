"""AutoFlow runs without a trained model: what a model with random weights writes is taken for one of
five replies, and a workflow is worth the digit that it asks for."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlora.agents.programs.step_workflow import StepWorkflow
from marlora.agents.types import AgentSpec, Sampling, Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.autoflow import AutoFlowConfig, AutoFlowTrainer


def flow(digit: int) -> str:
    """A workflow by which the interpreter is to say this digit."""
    return f"a:::process:::say {digit}:::next::b\nb:::terminal"


INVALID = "a:::process:::say 3:::next::a"
REPLIES = [flow(0), flow(2), flow(5), flow(9), INVALID]


@dataclass
class HashedWorkflow(StepWorkflow):
    """A team whose designer's replies stand for others, by their hash."""

    def read(self, reply: str) -> tuple[str, str]:
        return super().read(REPLIES[zlib.crc32(reply.encode()) % len(REPLIES)])


def worth(task: Task, episode: Episode) -> float:
    """What the digit of the workflow in force is worth, whatever the interpreter says."""
    return int(str(episode.state.values.get("workflow", flow(0))).split(":::")[2][-1]) / 10


def team(cls: type[StepWorkflow] = HashedWorkflow, **settings: Any) -> StepWorkflow:
    agents = [
        AgentSpec("designer", prompt="write", sampling=Sampling(max_tokens=4)),
        AgentSpec("reader", prompt="follow", policy="base", sampling=Sampling(max_tokens=2)),
    ]
    own = {"designer": "designer", "workflow": flow(0), "description": "digits",
           "design": "{description}", "tag": "",
           "ask": "{prompt}: {instruction}", "agents": agents}  # fmt: skip
    return cls(**{**own, **settings})


def config(folder: Path, model: Path, **changes: Any) -> AutoFlowConfig:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="tests.trainers.state_tasks:digits",
        rewards=["tests.trainers.autoflow_run:worth"],
        num_val_tasks=3,
        max_steps=3,
        tasks_per_step=2,
        num_generations=4,
        learning_rate=1e-2,
        lora_r=2,
        save_every=1,
    )
    return AutoFlowConfig(**{**settings, **changes})


def trainer(
    folder: Path,
    model: Path,
    cls: type[AutoFlowTrainer] = AutoFlowTrainer,
    lists: dict[str, Any] | None = None,
    **changes: Any,
) -> AutoFlowTrainer:
    """A run whose designer learns. `lists`: tasks as lists, in place of the task set."""
    return cls(system=team(), args=config(folder, model, **changes), **(lists or {}))


def talker(
    folder: Path, model: Path, say: Callable[..., str], cls: type[AutoFlowTrainer] = AutoFlowTrainer,
    **changes: Any,
) -> AutoFlowTrainer:  # fmt: skip
    """A run that asks a helper, on the scripted engine: `say(prompt, ref, sampling, k)` speaks for
    the helper and for the interpreter."""
    reader = team().specs[1]
    changes = {"helpers": {"designer": {"prompt": "You write."}}, "in_context": True, **changes}
    return cls(
        system=team(StepWorkflow, agents=[reader], designer=""),
        args=config(folder, model, **changes),
        engine=ScriptedEngine(say, context=16_384),
    )


def hashes(made: AutoFlowTrainer) -> dict[str, str]:
    """Of every adapter, as it is."""
    return {
        policy: base.adapters.sha256(policy)
        for base in made.run.learner.bases.values()
        for policy in base.policies
    }
