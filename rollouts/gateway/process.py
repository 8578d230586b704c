"""Running a user's command in a process of its own, for one task or for many: bounded in time,
memory and output, and ended with every process it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.concurrency import gather

MAX_STDOUT = 4 << 20  # bytes; a program that writes more has failed
MAX_STDERR = 2000  # bytes of its end that are kept
GRACE = 2.0  # seconds between SIGTERM and SIGKILL

# Limits are set by the shell that becomes the command: a Python function between fork and exec may
# hang in a process with threads.
LIMITED = (
    'if [ "$1" -gt 0 ]; then ulimit -v "$1" || exit 126; fi; if [ "$2" -gt 0 ]; then ulimit -t "$2"'
    ' || exit 126; fi; shift 2; exec "$@"'
)


class ProgramError(RuntimeError):
    """A program that failed; data of its episode."""


@dataclass(frozen=True)
class ProcessLimits:
    """`timeout` in seconds, `memory` in MiB of address space and `cpu_seconds` per process; 0: no
    limit."""

    timeout: float
    memory: int = 0
    cpu_seconds: int = 0


async def run_command(
    command: Sequence[str],
    stdin: str,
    environment: Mapping[str, str],
    folder: str | None,
    bounds: ProcessLimits,
) -> str:
    """Run a command and return its stdout. Raises `ProgramError` with the end of stderr if it
    failed or exceeded a bound."""
    process = await _started(command, environment, folder, bounds)
    output, errors = bytearray(), bytearray()
    try:
        async with asyncio.timeout(bounds.timeout) as clock:
            read, tail = _read(process.stdout, output, MAX_STDOUT), _tail(process.stderr, errors)
            await gather([_write(process, stdin), read, tail, _wait(process)])
    except TimeoutError as error:
        if not clock.expired():
            raise
        raise ProgramError(
            f"{_name(command)}: not done after {bounds.timeout:g} s (system.timeout)"
        ) from error
    finally:
        await _end(process)
    if process.returncode:
        raise _failure(command, process.returncode, errors)
    return _text(output)


class WorkerProcess:
    """A command that plays one task after the other: it reads a line of JSON per task, and writes a
    line of JSON, an object with `output` or `error`, when it is done with it. What else it writes
    to stdout is passed over.

    async with WorkerProcess(command, environment, folder, bounds) as worker:
        result = await worker.result(order)
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: str | None,
        bounds: ProcessLimits,
    ) -> None:
        self.command, self.environment = command, environment
        self.folder, self.bounds = folder, bounds
        self._errors = bytearray()

    async def __aenter__(self) -> WorkerProcess:
        self._process = await _started(self.command, self.environment, self.folder, self.bounds)
        self._tail = asyncio.ensure_future(_tail(self._process.stderr, self._errors))
        return self

    async def __aexit__(self, *error: object) -> None:
        await _end(self._process)
        self._tail.cancel()
        await asyncio.gather(self._tail, return_exceptions=True)

    async def result(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """What it says of one task. Raises `ProgramError` if it ends, is not done in time, or
        writes a line that is too long; then it is of no more use."""
        try:
            async with asyncio.timeout(self.bounds.timeout) as clock:
                return await self._ask(json.dumps(order) + "\n")
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise ProgramError(
                f"{_name(self.command)}: not done after {self.bounds.timeout:g} s (system.timeout)"
            ) from error

    async def _ask(self, line: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end says more
            stdin.write(line.encode())
            await stdin.drain()
        while True:
            try:
                said = await stdout.readline()
            except ValueError as error:
                raise ProgramError(
                    f"the program wrote a line of more than {MAX_STDOUT} bytes to stdout"
                ) from error
            if not said:
                await _exited(self._process)
                await asyncio.gather(self._tail, return_exceptions=True)
                raise _failure(self.command, self._process.returncode or 0, self._errors)
            with contextlib.suppress(ValueError, RecursionError):
                result = json.loads(said)
                if isinstance(result, dict) and ("output" in result or "error" in result):
                    return result


async def _started(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str | None,
    bounds: ProcessLimits,
) -> asyncio.subprocess.Process:
    limits = (str(bounds.memory * 1024), str(bounds.cpu_seconds))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", LIMITED, "sh"),
        *limits,
        *command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        limit=MAX_STDOUT,
        env=dict(environment),
        cwd=folder,
        start_new_session=True,
    )


def _failure(command: Sequence[str], code: int, stderr: bytes | bytearray) -> ProgramError:
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return ProgramError(f"{_name(command)}: {how}: {_last_line_first(_text(stderr))}")


def _last_line_first(stderr: str) -> str:
    """The last line, which in most languages names the error, then what came before it."""
    *before, last = [line for line in stderr.splitlines() if line.strip()] or ["nothing on stderr"]
    return last.strip() + ("\nstderr before it:\n" + "\n".join(before) if before else "")


async def _write(process: asyncio.subprocess.Process, text: str) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read its task
        process.stdin.write(text.encode())
        await process.stdin.drain()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.close()
        await process.stdin.wait_closed()


async def _read(stream: asyncio.StreamReader | None, into: bytearray, most: int) -> None:
    assert stream is not None
    while block := await stream.read(1 << 16):
        into += block
        if len(into) > most:
            raise ProgramError(f"the program wrote more than {most} bytes to stdout")


async def _tail(stream: asyncio.StreamReader | None, into: bytearray) -> None:
    assert stream is not None
    while block := await stream.read(1 << 16):
        into += block
        del into[:-MAX_STDERR]


async def _exited(process: asyncio.subprocess.Process) -> None:
    """Wait for the process alone: `process.wait` may also wait for its pipes, which a child it left
    behind holds open."""
    while process.returncode is None:
        await asyncio.sleep(0.02)


async def _wait(process: asyncio.subprocess.Process) -> None:
    """Wait for the process, then end the processes it left running."""
    await _exited(process)
    _send(process, signal.SIGKILL)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and its group, and close its pipes, even if another process holds them."""
    if process.returncode is None and _send(process, signal.SIGTERM):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_exited(process), GRACE)
    _send(process, signal.SIGKILL)
    # unread output keeps the pipes open, and no public method closes them
    vars(process)["_transport"].close()
    await process.wait()


def _send(process: asyncio.subprocess.Process, number: int) -> bool:
    try:
        os.killpg(process.pid, number)  # its session is its own, so the group is named like it
        return True
    except (ProcessLookupError, PermissionError):
        return False


def _name(command: Sequence[str]) -> str:
    return " ".join(command)[:200]


def _text(raw: bytes | bytearray) -> str:
    return bytes(raw).decode(errors="replace")
