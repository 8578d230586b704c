"""Plain Python in isolated processes: run a program, or check one against hidden tests.

A check takes two processes. The candidate has the program, the checker the tests; between them go
calls and answers, and an answer is rebuilt from builtin types before it is compared. So a program
that ends its process, forges `__eq__`, walks frames or writes to any descriptor gives the checker
nothing but a value that is right or wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO

from ...agents.execution import ExecutionResult, Limits, SandboxError, Status, TestResult, TestSuite
from .init import NO_PROGRAM
from .isolation import ENVIRONMENT, Isolation, Role, text_file

START = 60.0  # seconds that isolating a process may take, on a busy machine
GRACE = 2.0  # seconds between reaching a CPU limit and the end


class IsolatedProcess:
    """An isolated process, from its start to its certain end."""

    def __init__(
        self,
        isolation: Isolation,
        role: Role,
        limits: Limits,
        text: str,
        pipes: Mapping[str, int],
        argv: Sequence[str] = (),
        packages: Sequence[str] = (),
    ) -> None:
        program, (ready, ready_in) = text_file(text), os.pipe()
        try:
            descriptors = {"text": program, "ready": ready_in, **pipes}
            command = isolation.command(role, limits, descriptors, argv, packages)
            out = subprocess.PIPE if role == "python" else subprocess.DEVNULL
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,  # also says why isolation failed
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(program, ready_in, *pipes.values()),
                start_new_session=True,
            )
        except OSError as error:
            os.close(ready)
            raise SandboxError(f"{isolation.kind}: cannot be started ({error})") from error
        finally:
            os.close(program)
            os.close(ready_in)
        self.kind, self.ready = isolation.kind, ready

    def wait_until_ready(self, seconds: float = START) -> None:
        """Wait until the process is isolated. Raises `SandboxError` if it fails before the program
        begins."""
        with (
            contextlib.closing(os.fdopen(self.ready, "rb", buffering=0)) as ready,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(ready, selectors.EVENT_READ)
            if selector.select(seconds) and ready.read(1) == b"r":
                return
        self.end()
        assert self.process.stderr is not None
        lines = self.process.stderr.read(2000).decode(errors="replace").strip().splitlines()
        raise SandboxError(f"{self.kind}: {(lines or ['it did not start'])[-1][:300]}")

    def end(self) -> None:
        """Kill the process and all its children. In bubblewrap they end with the first process."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        self.end()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def _started(
    isolation: Isolation, role: Role, limits: Limits, text: str, pipes: Mapping[str, int]
) -> Iterator[IsolatedProcess]:
    process = IsolatedProcess(isolation, role, limits, text, pipes)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.close()


def run_plain(
    isolation: Isolation, program: str, limits: Limits, stop: int | None = None
) -> ExecutionResult:
    """Run a program as `__main__`; the output is what it prints. Blocks.

    `stop`: a file descriptor; when it can be read (or its other end is closed), the program is
    ended. Raises `SandboxError` if the process cannot be isolated.
    """
    with _started(isolation, "python", limits, program, {}) as isolated:
        start = time.monotonic()
        out, err, met = _read(isolated.process, limits, start, stop)
        seconds = time.monotonic() - start
        if met is None:
            try:
                isolated.process.wait(max(0.1, limits.seconds - seconds))
            except subprocess.TimeoutExpired:  # it closed its output and went on
                met = "time"
        if met is not None:
            isolated.end()
        code = isolated.process.returncode
    output, errors = out.decode(errors="replace"), err.decode(errors="replace")
    status = met or _status(code, errors, seconds, limits)
    return ExecutionResult(status, output, _reason(status, code, errors, limits), seconds=seconds)


def _read(
    process: subprocess.Popen[bytes], limits: Limits, start: float, stop: int | None
) -> tuple[bytearray, bytearray, Status | None]:
    """(stdout, stderr, limit that was reached first or None)."""
    assert process.stdout is not None and process.stderr is not None
    outputs = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for handle in [*outputs, *([] if stop is None else [stop])]:
            selector.register(handle, selectors.EVENT_READ)
        opened, met = len(outputs), None
        while opened and met is None:
            left = limits.seconds - (time.monotonic() - start)
            ready = selector.select(max(0.0, left)) if left > 0 else []
            if not ready:
                met = "time"
            for key, _ in ready:
                if key.fd == stop:
                    met = "killed"
                    break
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fd)
                    opened -= 1
                outputs[key.fd] += piece
            if sum(map(len, outputs.values())) > limits.output:
                met = "output"
    out, err = outputs.values()
    return out[: limits.output], err[: limits.output], met  # type: ignore[return-value]


def _status(code: int, errors: str, seconds: float, limits: Limits) -> Status:
    if code == 0:
        return "done"
    number = -code if code < 0 else code - 128
    if number == signal.SIGXCPU or (
        number == signal.SIGKILL and seconds + GRACE > limits.cpu_seconds
    ):
        return "time"
    if number in (
        signal.SIGKILL,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGSYS,
        signal.SIGTRAP,
    ):
        return "killed"
    last = (errors.strip().splitlines() or [""])[-1]
    if last.startswith("MemoryError"):
        return "memory"
    return "syntax" if code == NO_PROGRAM else "error"


def _reason(status: Status, code: int, errors: str, limits: Limits) -> str:
    last = (errors.strip().splitlines() or [f"exit code {code}"])[-1][:300]
    reasons = {
        "time": f"not done within {limits.seconds:g} s ({limits.cpu_seconds} s of CPU)",
        "output": f"printed more than {limits.output} bytes",
        "memory": f"needed more than {limits.memory >> 20} MiB",
        "killed": f"ended by a signal (exit code {code})",
    }
    return "" if status == "done" else reasons.get(status, last)


def check_plain(
    isolation: Isolation, program: str, tests: TestSuite, limits: Limits, stop: int | None = None
) -> TestResult:
    """The results of hidden tests of a program. Blocks. Time, memory and output are limited for
    both processes; reaching a limit fails the tests that are left."""
    nonce = secrets.token_hex(16)
    suite = json.dumps(
        {"nonce": nonce, "tests": tests.tests, "names": tests.names, "setup": tests.setup}
    )
    with contextlib.ExitStack() as stack:
        (calls_out, calls_in), (answers_out, answers_in), (verdict_out, verdict_in) = (
            _pipe(stack) for _ in range(3)
        )
        pipes = {"calls": calls_out.fileno(), "answers": answers_in.fileno()}
        candidate = stack.enter_context(_started(isolation, "candidate", limits, program, pipes))
        pipes = {
            "calls": calls_in.fileno(),
            "answers": answers_out.fileno(),
            "verdict": verdict_in.fileno(),
        }
        checker = stack.enter_context(_started(isolation, "checker", limits, suite, pipes))
        for end in (calls_out, calls_in, answers_out, answers_in, verdict_in):
            end.close()
        drained = [p.stderr for p in (candidate.process, checker.process) if p.stderr is not None]
        lines, reason = _verdict(
            verdict_out.fileno(), [pipe.fileno() for pipe in drained], limits, stop
        )
    results = [
        result for key, result in map(json.loads, lines) if secrets.compare_digest(key, nonce)
    ]
    return TestResult(tuple(results + [reason] * (len(tests.tests) - len(results))))


def _pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    out, into = os.pipe()
    return stack.enter_context(FileIO(out, "rb")), stack.enter_context(FileIO(into, "wb"))


def _verdict(
    verdict: int, drained: Sequence[int], limits: Limits, stop: int | None
) -> tuple[list[bytes], str]:
    """(whole lines of the verdict, why the rest is missing). Other output of the processes is read
    and dropped."""
    read, end, printed = b"", time.monotonic() + limits.seconds, 0
    with selectors.DefaultSelector() as selector:
        for handle in [verdict, *drained, *([] if stop is None else [stop])]:
            selector.register(handle, selectors.EVENT_READ)
        while True:
            left = end - time.monotonic()
            ready = [key.fd for key, _ in selector.select(left)] if left > 0 else []
            if not ready or stop in ready:
                return read.split(b"\n")[:-1], f"not done within {limits.seconds:g} s"
            for handle in ready:
                piece = os.read(handle, 65536)
                if handle == verdict:
                    read += piece
                    if not piece:
                        return (
                            read.split(b"\n")[:-1],
                            "the candidate could not be loaded, or the checker ended",
                        )
                    continue
                printed += len(piece)
                if not piece:
                    selector.unregister(handle)
                elif printed > limits.output:
                    return read.split(b"\n")[:-1], f"printed more than {limits.output} bytes"
