"""A system that plays each task by the program that the task names, so that one run trains on the
programs of many frameworks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marlora.agents.types import Task
from marlora.rollouts.gateway.programs import Command, ExternalProgram
from marlora.rollouts.gateway.session import Session


@dataclass
class EachFramework(ExternalProgram):
    """`task.meta["command"]`, run as a `Command`."""

    async def play(self, task: Task, session: Session) -> Any:
        return await Command(self.specs, command=task.meta["command"]).play(task, session)
