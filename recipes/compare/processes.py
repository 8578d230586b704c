"""Processes of runs: each ends when this one ends, however that ends. Several runs, one after the
other, are forked from one process that has made the imports, which take longer than many a run.

`python -m marlora.recipes.compare.processes OWNER_PID` is that process. It reads a job from each
line of its standard input and answers it with an exit code; it forks only while it has one thread
and no accelerator, which a forked process could not use.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from marlora.rollouts.engines.vllm import supervisor
from marlora.trainers.collection.background import handled

WAIT = 0.2  # seconds between two looks at a run
IMPORTS = (  # what runs need, besides their recipe
    *("marlora.recipes.sft_team", "marlora.rollouts.engines.transformers"),
    *("transformers.models.auto.modeling_auto", "peft", "trl"),
)
Start = Callable[[Sequence[str], Path], int]  # a command, its log -> the exit code


def supervised(words: Sequence[str], log: Path) -> int:
    """The exit code of a command whose output is appended to `log`, and which ends when this
    process ends, however that ends.

    Raises `KeyboardInterrupt` on Ctrl-C, SIGTERM and SIGUSR1 (which clusters send before the time
    limit), once the command has ended.
    """
    start = [sys.executable, "-P", str(Path(supervisor.__file__)), str(os.getpid()), str(log)]
    with _until_stopped() as stopping:
        process = subprocess.Popen(
            [*start, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # signals are handled here
        )
        try:
            while not stopping and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(WAIT)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # the supervisor ends the run, which saves its last step
            code = process.wait()
    return code


@contextlib.contextmanager
def _until_stopped() -> Iterator[list[int]]:
    """A list that gets a number where this process is asked to stop; then `KeyboardInterrupt`."""
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    with handled(stop, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
        yield stopping
    if stopping:
        raise KeyboardInterrupt


def can_fork(words: Sequence[str]) -> bool:
    """Whether a command is one that a fork can stand for: `python -m MODULE ...`, started by nobody
    who starts several processes."""
    return sys.platform == "linux" and words[1] == "-m" and "MASTER_PORT" not in os.environ


class Forks:
    """Starts commands as `supervised` does, without their imports where that can be.

    with contextlib.closing(Forks(supervised)) as start:
        code = start([sys.executable, "-m", "marlora.recipes.sft_team", "--config", FILE], log)

    Args:
        otherwise: starts what cannot be forked: a recipe in a file of its own, any run where there
            is an accelerator.
    """

    def __init__(self, otherwise: Start) -> None:
        self.otherwise = otherwise
        self.refused = ""  # why nothing can be forked here
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(self, words: Sequence[str], log: Path) -> int:
        if self.refused or not can_fork(words):
            return self.otherwise(words, log)
        with _until_stopped() as stopping:
            answer = self._answer({"words": list(words[2:]), "log": str(log.absolute())}, stopping)
            if answer is None:  # this process is to stop, or that one has died
                return self.close() or 1
        if "code" in answer:
            return int(answer["code"])
        self.refused = str(answer["refused"])
        return self.otherwise(words, log)

    def _answer(self, job: Mapping[str, Any], stopping: Sequence[int]) -> dict[str, Any] | None:
        """What comes of a job; None if there is no answer."""
        if self._server is None:
            command = [sys.executable, "-m", __name__, str(os.getpid()), *IMPORTS]
            self._server = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # signals are handled here
            )
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps(job).encode() + b"\n")
            server.stdin.flush()
        except BrokenPipeError:
            return None
        while not stopping:
            if select.select([server.stdout], [], [], WAIT)[0]:
                line = server.stdout.readline()
                return json.loads(line) if line else None
        return None

    def close(self) -> int:
        """End the process, and a run that has not ended; its exit code. Another one is started for
        the next run."""
        server, self._server = self._server, None
        if server is None:
            return 0
        assert server.stdin is not None and server.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        code = server.wait()
        server.stdout.close()
        return code if code >= 0 else 128 - code


# the process that forks


class Fork:
    """A forked process, with what `supervisor.end` asks of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself
            os.setpgid(pid, pid)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self._reap(0)
        assert code is not None
        return code

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def refusal() -> str:
    """Why this process cannot fork, "" if it can: what another thread holds, and what an
    accelerator's driver knows, would be of no use in the fork."""
    from marlora.trainers.distributed.ranks import has_accelerator

    if has_accelerator():
        return "there is an accelerator"
    threads = len(os.listdir("/proc/self/task"))
    return "" if threads == 1 else f"imports have left {threads} threads"


def serve(owner: int) -> list[str] | None:
    """Answer jobs until there are no more, then return None; in each fork its words."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    for module in sys.argv[2:]:
        importlib.import_module(module)
    parent = os.getpid()
    while line := _line(owner, stopping):
        job, refused = json.loads(line), refusal()
        answer: dict[str, object] = {"refused": refused}
        if not refused:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                os.close(answers)
                _become(job["log"], parent)
                return list(job["words"])
            answer = {"code": _ended(Fork(pid), owner, stopping)}
        os.write(answers, json.dumps(answer).encode() + b"\n")
    return None


def _become(log: str, parent: int) -> None:
    """Make this fork what `supervisor` starts: a process group of its own, whose output goes to a
    log, and which ends with its parent."""
    os.setpgid(0, 0)
    supervisor.die_with_supervisor()
    if os.getppid() != parent:
        os._exit(1)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(out)
    os.close(null)


def _ended(run: Fork, owner: int, stopping: Sequence[int]) -> int:
    """The exit code of a run, which is ended when the owner is gone."""
    while not stopping and run.poll() is None and os.getppid() == owner:
        if select.select([0], [], [], supervisor.POLL)[0]:  # its end: a job waits for the answer
            break
    supervisor.end(run)
    code = run.wait()
    return code if code >= 0 else 128 - code


def _line(owner: int, stopping: Sequence[int]) -> bytes:
    """The next line of standard input, b"" at its end."""
    line = b""
    while not line.endswith(b"\n"):
        if stopping or os.getppid() != owner:
            return b""
        if select.select([0], [], [], supervisor.POLL)[0]:
            piece = os.read(0, 65536)
            if not piece:
                return b""
            line += piece
    return line


def main() -> None:
    """Serve; in a fork, run the recipe as `python -m` does."""
    words = serve(int(sys.argv[1]))
    if words is not None:
        from marlora.recipes.launch.settings import run

        recipe = importlib.import_module(words[0])
        sys.argv = [str(recipe.__file__), *words[1:]]
        run(recipe.main)


if __name__ == "__main__":
    main()
