"""Designs: workflows in step language that a designer was asked for, and what they earned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.programs.step_workflow import StepWorkflow
from ....agents.programs.workflow import reward_of
from ....agents.system import System
from ....agents.team import Team
from ....agents.types import Reward, SettingError, Task, Turn
from ....rollouts.types import Episode
from ...credit.program_scores import invalid_kinds


@dataclass(frozen=True)
class ScoredWorkflow:
    """What a designer wrote and what it earned.

    episode: in which it was written. text: the workflow in one spelling, "" with a `fault`.
    reward: the mean score on training tasks, or `invalid_reward`; NaN if the episode failed.
    """

    episode: Episode
    text: str
    fault: str
    reward: float


@dataclass
class WorkflowDesign(System):
    """One agent, which is asked once for a workflow of `target`. Its turn's reward `valid` says
    whether that can be followed, with the fault where it cannot."""

    target: StepWorkflow | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise SettingError("WorkflowDesign(target=...): expected a StepWorkflow")

    async def run(self, task: Task, team: Team) -> Turn:
        assert self.target is not None
        (agent,) = team
        turn = await agent.reply(task.prompt)
        _, fault = self.target.read(turn.text)
        team.rewards.append(reward_of(turn, "valid", float(not fault), fault))
        return turn


def design_statistics(written: Sequence[ScoredWorkflow]) -> dict[str, Any]:
    """The workflows of a step in numbers: `reward` is the mean, `score` that of valid ones, `best`
    the highest (None without any); shares that are `valid` and, by kind of fault, `invalid`."""
    valid = [each for each in written if each.text]
    validity = [Reward("valid", float(bool(each.text)), each.fault) for each in written]
    return {
        "reward": mean([each.reward for each in written if not math.isnan(each.reward)]),
        "score": mean([each.reward for each in valid]),
        "best": max((each.reward for each in valid), default=None),
        "valid": len(valid) / len(written),
        "distinct": len({each.text for each in valid}),
        "invalid": invalid_kinds(validity),
    }


def mean(values: Sequence[float]) -> float | None:
    """None without any."""
    return math.fsum(values) / len(values) if values else None
