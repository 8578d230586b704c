"""Workflow programs in Monty: an interpreter of Python's core without files, network or clock,
which calls out only through functions that it is given. Its workers are isolated processes too, so
a bug in the interpreter does not suffice to get out.

A program's calls are answered in rounds: it runs until it waits for something, then all its open
calls are answered concurrently, and it goes on when the last answer is there. So the order of calls
depends on the program and the answers, never on timing, and an episode can be replayed from its
turns.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ...agents.concurrency import gather
from ...agents.execution import (
    ExecutionResult,
    Externals,
    Limits,
    ProgramError,
    SandboxError,
    Status,
)
from .isolation import Isolation
from .workflow_values import BadValue, answering, plain_value, prelude

# of a worker, which serves program after program
WORKER = Limits(seconds=1.0, cpu_seconds=10**6, memory=2 << 30)
# the time that programs see: nothing they do may depend on the clock
EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
MAX_WORKERS = 256  # a worker is held while its program waits for externals
MEMORY = 64 << 20  # bytes of a program's values; bounds its results and error texts too
WORDS = 2000  # characters of an error text that are read


class Interpreter:
    """A pool of isolated Monty workers, for every event loop of this process. Raises `SandboxError`
    if Monty is not installed."""

    def __init__(self, isolation: Isolation) -> None:
        try:
            import pydantic_monty
            from pydantic_monty import _binary

            binary = os.path.realpath(_binary.find_monty_binary())
        except (ImportError, FileNotFoundError) as error:
            raise SandboxError(
                f"workflow programs need Monty ({error}); install pydantic-monty==1.4.0"
            ) from error
        self.monty: Any = pydantic_monty
        self._folder = tempfile.TemporaryDirectory(prefix="marlora-monty-")
        start = Path(self._folder.name) / "monty"
        command = shlex.join(isolation.command("exec", WORKER, {}, [binary]))
        start.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        start.chmod(0o700)
        self._pool: Any = self.monty.AsyncMonty(
            binary_path=start,
            min_processes=0,
            max_processes=MAX_WORKERS,
            max_checkouts_per_worker=1000,
        )
        self._first, self._entered = threading.Lock(), Future[None]()

    async def _enter(self) -> None:
        """Open the pool once; other callers wait until it is open, in any event loop."""
        if self._first.acquire(blocking=False):
            try:
                await self._pool.__aenter__()
                self._entered.set_result(None)
            except BaseException as error:
                self._entered.set_exception(error)
                raise
        await asyncio.wrap_future(self._entered)

    async def run(self, program: str, externals: Externals, limits: Limits) -> ExecutionResult:
        """Run a program; the value of its last line, an expression, is the result's value.

        Errors of externals end the run and are raised here, except `ProgramError`, which the
        program can catch.
        """
        await self._enter()
        mark = f"__marlora_{secrets.token_hex(8)}"  # programs cannot guess names that begin with it
        try:
            program = answering(program, mark)
        except SyntaxError as wrong:
            return ExecutionResult("syntax", error=_line(wrong))
        printed = self.monty.CollectString(max_bytes=limits.output)
        start, monty = time.monotonic(), self.monty
        value, error, line = None, "", 0
        status: Status = "done"
        try:
            async with self._pool.checkout(limits=_bounds(limits), os_policy=_policy()) as session:
                value = await _Run(monty, externals, limits, mark).feed(session, program, printed)
        except monty.MontySyntaxError as wrong:
            status, error = "syntax", _line(wrong)
        except _TooManyCalls:
            status, error = "calls", f"called more than {limits.calls} externals"
        except BadValue as wrong:
            status, error = "error", _line(wrong)
        except monty.MontyRuntimeError as wrong:
            status, error = _met(wrong, limits), _line(wrong)
            line = _where(wrong) if status == "error" else 0
        except monty.MontyCrashedError as wrong:
            status, error = "killed", _line(wrong)
        except monty.MontyError as wrong:
            status, error = "error", _line(wrong)
        seconds = time.monotonic() - start
        return ExecutionResult(status, printed.output[: limits.output], error, value, seconds, line)

    async def close(self) -> None:
        if self._entered.done():
            self._first, self._entered = threading.Lock(), Future[None]()
            await self._pool.__aexit__(None, None, None)


def _line(error: BaseException) -> str:
    return " ".join(str(error)[:WORDS].split())[:300]


def _where(wrong: Any) -> int:
    """The line in which a program raised, the innermost of its own."""
    frames = wrong.traceback()
    return frames[-1].line if frames else 0


def _bounds(limits: Limits) -> dict[str, Any]:
    return {
        "max_feed_duration_secs": min(limits.seconds, float(limits.cpu_seconds)),
        "max_memory": min(limits.memory, MEMORY),
        "max_recursion_depth": 200,
        "max_suspensions": 4 * limits.calls + 100,
    }


def _policy() -> dict[str, Any]:
    return {
        "datetime": EPOCH,
        "timezone": "utc",
        "sleep": "zero",
        "process_time": "zero",
        "random_start": {"seed": 0},
    }


def _met(wrong: Any, limits: Limits) -> Status:
    inner = wrong.exception()
    if isinstance(inner, TimeoutError):
        return "time"
    if isinstance(inner, MemoryError):
        return "output" if str(inner).endswith(f"> {limits.output} bytes") else "memory"
    return "calls" if isinstance(inner, RuntimeError) and "suspension" in str(inner) else "error"


class _TooManyCalls(Exception):
    pass


class _Run:
    """One running program."""

    def __init__(self, monty: Any, externals: Externals, limits: Limits, mark: str) -> None:
        self.monty, self.externals, self.limits, self.mark = monty, externals, limits, mark
        self.open: dict[int, Awaitable[Any]] = {}  # calls by number
        self.answers: dict[int, dict[str, Any]] = {}  # of the round, not handed in yet
        self.calls = 0

    async def feed(self, session: Any, program: str, printed: Any) -> Any:
        monty = self.monty
        try:
            # Names only: every call comes back as a snapshot, and is answered below.
            raw = {f"{self.mark}_{name}": _never for name in self.externals}
            at = await session.feed_start(
                prelude(self.mark, self.externals), external_lookup=raw, print_callback=printed
            )
            while not isinstance(at, monty.MontyComplete):
                at = await at.resume_auto()  # a name
            at = await session.feed_start(program, external_lookup={}, print_callback=printed)
            while not isinstance(at, monty.MontyComplete):
                if isinstance(at, monty.AsyncFunctionSnapshot):
                    at = await self._called(at)
                elif isinstance(at, monty.AsyncFutureSnapshot):
                    number = await self._next(at.pending_call_ids)
                    at = await at.resume({number: self.answers.pop(number)})
                else:
                    at = await at.resume_auto()  # a name
            return plain_value(at.output)
        finally:
            for left in self.open.values():
                if asyncio.iscoroutine(left):
                    left.close()

    async def _called(self, at: Any) -> Any:
        if at.is_os_function:
            return await at.resume_not_handled()
        name = str(at.function_name).removeprefix(f"{self.mark}_")
        if at.object_id is not None or name == at.function_name or name not in self.externals:
            return await at.resume(
                {"exception": NameError(f"name {str(at.function_name)[:80]!r} is not defined")}
            )
        self.calls += 1
        if self.calls > self.limits.calls:
            raise _TooManyCalls
        try:
            args, kwargs = plain_value(at.args), plain_value(at.kwargs)
            self.open[at.call_id] = self.externals[name](*args, **kwargs)
        except (ProgramError, TypeError, BadValue) as error:
            return await at.resume({"exception": ValueError(f"{name}: {error}"[:300])})
        return await at.resume({"future": ...})

    async def _next(self, pending: list[int]) -> int:
        """The number of the first answered call. If none is answered, all open calls are answered;
        answers are handed in one at a time, in the order of the calls, since Monty takes several in
        any order."""

        async def one(number: int) -> None:
            try:
                self.answers[number] = {"return_value": await self.open.pop(number)}
            except ProgramError as error:
                self.answers[number] = {"exception": ValueError(str(error)[:300])}

        if not self.answers:
            await gather(one(number) for number in sorted(self.open))
        return min(number for number in pending if number in self.answers)


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("externals are answered in rounds")
