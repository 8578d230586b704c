"""The sandbox: runs programs that a model wrote. Two entry points, two interpreters behind them.

    # a workflow program, in Monty: it can call `ask` and nothing else
    result = await run("await ask('2 + 2?')", {"ask": ask})
    result = await run("print(2 + 2)")  # plain Python, in an isolated process
    result = await check(program, TestSuite(("assert f(2) == 4",), ("f",)))

There is no fallback: where no isolation holds (`self_test` tries them), both raise `SandboxError`,
which ends a run. Whatever a program does is an `ExecutionResult`, and costs only its episode.
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
    """One thread per core for plain programs; those that wait have not begun, so their time limits
    do not run."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="sandbox")


@functools.cache
def _interpreter(best: Isolation) -> Interpreter:
    return Interpreter(best)


async def run(
    program: str, externals: Externals | None = None, limits: Limits = LIMITS
) -> ExecutionResult:
    """Run a program: with `externals` (even none, `{}`) a workflow program, without them plain
    Python.

    Raises `SandboxError` if programs cannot be run on this machine, and errors of externals (except
    `ProgramError`, which the program can catch).
    """
    best = await _isolation()
    if len(program) > MAX_PROGRAM or "\0" in program:
        return ExecutionResult(
            "syntax", error=f"no program: more than {MAX_PROGRAM} characters, or a NUL among them"
        )
    if externals is not None:
        return await _interpreter(best).run(program, externals, limits)
    return await _in_thread(run_plain, best, program, limits)


async def check(program: str, tests: TestSuite, limits: Limits = LIMITS) -> TestResult:
    """The results of hidden tests of a program, which cannot see them. Raises `SandboxError` if
    programs cannot be run on this machine."""
    best = await _isolation()
    if len(program) > MAX_PROGRAM or "\0" in program:
        return TestResult(("no program",) * len(tests.tests))
    return await _in_thread(check_plain, best, program, tests, limits)


def state() -> tuple[str, str]:
    """(what runs programs on this machine, what to do), for `marlora doctor`."""
    try:
        best = isolation()
        _interpreter(best)
    except SandboxError as error:
        return "none", str(error)
    names = " and ".join(each.kind for each in isolations())
    runners = f"Monty, plain Python in {best.kind} (held against attacks: {names})"
    if best.kind == "landlock":
        return (
            f"{runners}: reduced, names and sizes of files can be seen",
            "allow user namespaces, and install bubblewrap",
        )
    return runners, ""


async def _isolation() -> Isolation:
    return await asyncio.get_running_loop().run_in_executor(_threads(), isolation)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args, stop=...)` in a thread. `stop` is a file descriptor that can be read
    once the caller is cancelled."""
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
