"""Where programs that a model wrote are run: one door, two interpreters behind it, and no way
around.

    outcome = await run("await ask('2 + 2?')", {"ask": ask})       # a workflow program, in Monty: it can call `ask` and nothing else
    outcome = await run("print(2 + 2)")                            # plain Python, in a cage
    verdict = await check(program, Exam(("assert f(2) == 4",), ("f",)))

Nothing falls back: where no cage holds (`proof.py` tries), both raise `SandboxError`, which ends a
run. Whatever a program does is an `ExecutionResult`, and costs the episode that wrote it.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...agents.execution import (
    ExecutionResult,
    Externals,
    Limits,
    ProgramError,
    SandboxError,
    TestResult,
    TestSuite,
)
from .isolation import Isolation
from .python import check_plain, run_plain
from .self_test import isolation, isolations
from .workflow import Interpreter

__all__ = [
    "Limits",
    "ExecutionResult",
    "ProgramError",
    "SandboxError",
    "TestSuite",
    "TestResult",
    "check",
    "run",
    "state",
]

T = TypeVar("T")
MAX_PROGRAM = 1 << 20  # characters
LIMITS = Limits()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """As many plain programs at once as there are cores: what waits longer has not begun, so no
    clock of it runs."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="sandbox")


@functools.cache
def _interpreter(held: Isolation) -> Interpreter:
    return Interpreter(held)


async def run(
    program: str, externals: Externals | None = None, limits: Limits = LIMITS
) -> ExecutionResult:
    """Run a program: with `externals` (even none, `{}`) a workflow program, without them plain
    Python.

    Raises `SandboxError` if programs cannot be run here, and what an external raises (but
    `ProgramError`, which the program sees).
    """
    held = await _held()
    if len(program) > MAX_PROGRAM or "\0" in program:
        return ExecutionResult(
            "syntax", error=f"no program: more than {MAX_PROGRAM} characters, or a NUL among them"
        )
    if externals is not None:
        return await _interpreter(held).run(program, externals, limits)
    return await _in_thread(run_plain, held, program, limits)


async def check(program: str, tests: TestSuite, limits: Limits = LIMITS) -> TestResult:
    """What hidden tests say of a program that cannot see them. Raises `SandboxError` if programs
    cannot be run here."""
    held = await _held()
    if len(program) > MAX_PROGRAM or "\0" in program:
        return TestResult(("no program",) * len(tests.tests))
    return await _in_thread(check_plain, held, program, tests, limits)


def state() -> tuple[str, str]:
    """(what runs programs here, what to do): for `marlora doctor`."""
    try:
        held = isolation()
        _interpreter(held)
    except SandboxError as error:
        return "none", str(error)
    names = " and ".join(each.kind for each in isolations())
    words = f"Monty, plain Python in {held.kind} (held against attacks: {names})"
    if held.kind == "landlock":
        return (
            f"{words}: reduced, names and sizes of files can be told",
            "allow user namespaces, and install bubblewrap",
        )
    return words, ""


async def _held() -> Isolation:
    return await asyncio.get_running_loop().run_in_executor(_threads(), isolation)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call it with a file descriptor that tells it to stop, which happens when whoever waits for
    the result is cancelled."""
    out, into = os.pipe()
    work = asyncio.get_running_loop().run_in_executor(
        _threads(), functools.partial(function, *args, stop=out)
    )
    try:
        return await asyncio.shield(work)
    finally:
        os.close(into)
        if work.done():
            os.close(out)
        else:
            work.add_done_callback(lambda _: os.close(out))
