"""A workflow of the toy model that writes programs."""

from __future__ import annotations

from typing import Any

from marlora.agents.programs.workflow import Workflow
from marlora.trainers.testbeds.programs import WORKFLOW


def tiny_workflow(**settings: Any) -> Workflow:
    """The system of these tasks: a designer with a policy of its own; the executor is the base."""
    return Workflow(**{**WORKFLOW, **settings})
