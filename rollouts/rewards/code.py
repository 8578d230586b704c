"""Rewards of coding tasks: what hidden tests say of a program."""

from __future__ import annotations

from ...agents.execution import TestResult, answered
from ...agents.programs.operators import CHECKS
from ...agents.types import Task
from ..sandbox.sandbox import check


async def public_verdict(task: Task, text: str) -> TestResult:
    """What the public tests say of the program in `text`. No tests: no results, and not passed."""
    return await check(*answered(task, text, task.meta["tests"]), CHECKS)


async def hidden_verdict(task: Task, text: str) -> TestResult:
    """What the hidden tests say of the program in `text`: for rewards and evaluation alone. Raises
    `ValueError` if the task has none."""
    if not task.meta.get("_tests"):
        raise ValueError(f"task {task.id!r} has no hidden tests; whoever plays never has them")
    return await check(*answered(task, text, task.meta["_tests"]), CHECKS)
