"""Running a user's command in a process of its own: bounded in time, memory and output, and ended
with every process it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    limits = (str(bounds.memory * 1024), str(bounds.cpu_seconds))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        LIMITED,
        "sh",
        *limits,
        *command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=dict(environment),
        cwd=folder,
        start_new_session=True,
    )
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
        how = (
            f"ended by signal {-process.returncode}"
            if process.returncode < 0
            else f"exit code {process.returncode}"
        )
        raise ProgramError(f"{_name(command)}: {how}: {_last_line_first(_text(errors))}")
    return _text(output)


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
