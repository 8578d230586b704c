"""Hidden tests of coding tasks, run on a program in the sandbox."""

from __future__ import annotations

from ...agents.execution import TestResult, answered
from ...agents.programs.operators import CHECKS
from ...agents.types import Task
from ..sandbox.sandbox import check


async def hidden_verdict(task: Task, text: str) -> TestResult:
    """Results of the hidden tests on the program in `text`; for rewards and evaluation only. Raises
    `ValueError` if the task has none."""
    if not task.meta.get("_tests"):
        raise ValueError(
            f"task {task.id!r} has no hidden tests; a task as agents see it never has them"
        )
    return await check(*answered(task, text, task.meta["_tests"]), CHECKS)
