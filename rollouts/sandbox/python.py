"""Plain Python in a cage: run a program, or check one against tests that it never sees.

To check takes two processes. The candidate holds the program, the checker the tests; between them
go calls and answers, and an answer is rebuilt of builtin types before it is compared. So a program
can end its own process, forge `__eq__`, walk frames or write to any descriptor it finds, and has
told the checker nothing but a value that is right or wrong.
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

START = 60.0  # seconds a cage may take until it is shut, on a busy machine
GRACE = 2.0  # seconds between a CPU limit that is met and the end


class IsolatedProcess:
    """A running process in a cage, from start to certain end."""

    def __init__(
        self,
        cage: Isolation,
        role: Role,
        limits: Limits,
        text: str,
        pipes: Mapping[str, int],
        argv: Sequence[str] = (),
        packages: Sequence[str] = (),
    ) -> None:
        program, (ready, told) = text_file(text), os.pipe()
        try:
            command = cage.command(
                role, limits, {"text": program, "ready": told, **pipes}, argv, packages
            )
            out = (
                subprocess.PIPE if role == "python" else subprocess.DEVNULL
            )  # standard error tells why a cage failed, too
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(program, told, *pipes.values()),
                start_new_session=True,
            )
        except OSError as error:
            os.close(ready)
            raise SandboxError(f"{cage.kind}: cannot be started ({error})") from error
        finally:
            os.close(program)
            os.close(told)
        self.kind, self.ready = cage.kind, ready

    def wait_until_shut(self, seconds: float = START) -> None:
        """Raises `SandboxError` if the cage fails before the program begins."""
        with (
            contextlib.closing(os.fdopen(self.ready, "rb", buffering=0)) as ready,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(ready, selectors.EVENT_READ)
            if selector.select(seconds) and ready.read(1) == b"r":
                return
        self.end()
        assert self.process.stderr is not None
        words = self.process.stderr.read(2000).decode(errors="replace").strip().splitlines()
        raise SandboxError(f"{self.kind}: {(words or ['it did not start'])[-1][:300]}")

    def end(self) -> None:
        """Kill all there is of it, at once. In bubblewrap the death of the first process is the
        death of all."""
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
    cage: Isolation, role: Role, limits: Limits, text: str, pipes: Mapping[str, int]
) -> Iterator[IsolatedProcess]:
    caged = IsolatedProcess(cage, role, limits, text, pipes)
    try:
        caged.wait_until_shut()
        yield caged
    finally:
        caged.close()


def run_plain(
    cage: Isolation, program: str, limits: Limits, stop: int | None = None
) -> ExecutionResult:
    """Run a program as `__main__`, with what it prints as the output. Blocks.

    `stop`: a file descriptor; when it can be read (or its other end is closed), the program is
    ended. Raises `SandboxError` if the cage fails.
    """
    with _started(cage, "python", limits, program, {}) as caged:
        start = time.monotonic()
        out, err, met = _read(caged.process, limits, start, stop)
        seconds = time.monotonic() - start
        if met is None:
            try:
                caged.process.wait(max(0.1, limits.seconds - seconds))
            except subprocess.TimeoutExpired:  # it closed its output and went on
                met = "time"
        if met is not None:
            caged.end()
        code = caged.process.returncode
    output, errors = out.decode(errors="replace"), err.decode(errors="replace")
    status = met or _status(code, errors, seconds, limits)
    return ExecutionResult(status, output, _words(status, code, errors, limits), seconds=seconds)


def _read(
    process: subprocess.Popen[bytes], limits: Limits, start: float, stop: int | None
) -> tuple[bytearray, bytearray, Status | None]:
    """Both outputs to their ends, or up to the limit that was met first."""
    assert process.stdout is not None and process.stderr is not None
    found = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for handle in [*found, *([] if stop is None else [stop])]:
            selector.register(handle, selectors.EVENT_READ)
        opened, met = len(found), None
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
                found[key.fd] += piece
            if sum(map(len, found.values())) > limits.output:
                met = "output"
    out, err = found.values()
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


def _words(status: Status, code: int, errors: str, limits: Limits) -> str:
    last = (errors.strip().splitlines() or [f"exit code {code}"])[-1][:300]
    words = {
        "time": f"not done within {limits.seconds:g} s ({limits.cpu_seconds} s of CPU)",
        "output": f"printed more than {limits.output} bytes",
        "memory": f"needed more than {limits.memory >> 20} MiB",
        "killed": f"ended by a signal (exit code {code})",
    }
    return "" if status == "done" else words.get(status, last)


def check_plain(
    cage: Isolation, program: str, tests: TestSuite, limits: Limits, stop: int | None = None
) -> TestResult:
    """What the tests say of a program. Blocks. Time, memory and output hold for both processes; a
    limit met fails the tests that are left."""
    nonce = secrets.token_hex(16)
    told = json.dumps(
        {"nonce": nonce, "tests": tests.tests, "names": tests.names, "setup": tests.setup}
    )
    with contextlib.ExitStack() as stack:
        (calls_out, calls_in), (answers_out, answers_in), (verdict_out, verdict_in) = (
            _pipe(stack) for _ in range(3)
        )
        ours = {"calls": calls_out.fileno(), "answers": answers_in.fileno()}
        candidate = stack.enter_context(_started(cage, "candidate", limits, program, ours))
        ours = {
            "calls": calls_in.fileno(),
            "answers": answers_out.fileno(),
            "verdict": verdict_in.fileno(),
        }
        checker = stack.enter_context(_started(cage, "checker", limits, told, ours))
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
    """(whole lines of the verdict, why the rest is missing). What the processes say beside it is
    read and dropped."""
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
