"""Types for programs that a model wrote: limits, results, tests and their results.

`Services(execute=..., check=...)` give a team the functions that run and test them; nothing here
runs anything, and no program of a model is ever run in the process of a team.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .types import SettingError, Task

Externals = Mapping[str, Callable[..., Awaitable[Any]]]
_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
Status = Literal["done", "error", "syntax", "time", "memory", "output", "calls", "killed"]


class SandboxError(SettingError):
    """Programs of a model cannot be run safely on this machine, or the sandbox itself failed. Never
    a fault of the program."""


class ProgramError(ValueError):
    """A function that a program can call was used wrongly; the program sees it as an exception and
    may go on."""


@dataclass(frozen=True)
class Limits:
    """The limits of one run of a program. All hold at once, and none can be raised from inside.

    Args:
        seconds: wall clock, waiting for externals left out. `cpu_seconds`: of its processes
            together.
        memory: bytes of address space; of a workflow program's values, and then 64 MiB at most.
        output: bytes it may print. `scratch`: bytes it may write to `/tmp`, 0 for none.
        calls: externals it may call. A plain program has none.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 512 << 20
    output: int = 64 << 10
    scratch: int = 0
    calls: int = 100

    def __post_init__(self) -> None:
        if (
            min(self.seconds, self.cpu_seconds, self.memory, self.output) <= 0
            or self.scratch < 0
            or self.calls < 0
        ):
            raise SettingError(
                f"limits: positive seconds, cpu_seconds, memory and output expected, got {self}"
            )


@dataclass(frozen=True)
class ExecutionResult:
    """The result of a program's run.

    Args:
        status: `done`; `error` (it raised, or ended with another exit code than 0); `syntax` (it is
            no program); `time`, `memory`, `output`, `calls` (the limit it met); `killed` (by a
            signal).
        output: what it printed, cut at the limit. `error`: what went wrong, one line.
        value: the value of a workflow program, made of None, bool, int, float, str, list, tuple and
            dict; None for a plain one.
        seconds: how long it took, externals included.
        line: of a workflow program that raised the line where it did, from 1; 0 where that is not
            known.
    """

    status: Status
    output: str = ""
    error: str = ""
    value: Any = None
    seconds: float = 0.0
    line: int = 0

    @property
    def ok(self) -> bool:
        return self.status == "done"


class Execute(Protocol):
    """Runs a program: with `externals` (even none, `{}`) a workflow program, which can call only
    these; without, plain Python."""

    async def __call__(
        self, program: str, externals: Externals | None = None, limits: Limits = ...
    ) -> ExecutionResult: ...


@dataclass(frozen=True)
class TestSuite:
    """The tests that a program has to pass.

    Args:
        tests: programs that raise if the candidate is wrong; each runs in a fresh module.
        names: functions of the candidate that they may call. Arguments and results cross as builtin
            types.
        setup: run before each test, from the task alone: imports and helpers.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True)
class TestResult:
    """Per test "" if it passed, else why not in one line."""

    results: tuple[str, ...]

    @property
    def share(self) -> float:
        return (
            sum(not result for result in self.results) / len(self.results) if self.results else 0.0
        )

    @property
    def passed(self) -> bool:
        return bool(self.results) and not any(self.results)


class Check(Protocol):
    """Tests a program, which cannot see its tests."""

    async def __call__(
        self, program: str, tests: TestSuite, limits: Limits = ...
    ) -> TestResult: ...


def program_in(text: str) -> str:
    """The program of an answer: its last fenced block, or all of it where there is none."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1] if blocks else text).strip("\n")


def fenced_blocks(text: str) -> list[tuple[int, int]]:
    """Where the closed fenced blocks of a text stand: the start and the end of what each holds."""
    return [match.span(1) for match in _FENCED.finditer(text)]


def closed(text: str) -> str:
    """The text without a fenced block at its end that is not closed, such as one that was cut
    off."""
    return text[: text.rindex("```")].rstrip() if text.count("```") % 2 else text


def answered(task: Task, text: str, tests: Sequence[str]) -> tuple[str, TestSuite]:
    """The program in an answer to a coding task, and the suite of these tests over the task's
    functions.

    The program stands after the task's own text (imports and helpers, `meta["setup"]`), so that it
    may be a whole function, or the body that completes the last one there. Raises `SettingError` if
    the task names no functions for its tests to call.
    """
    names = task.meta.get("names")
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise SettingError(
            f"task {task.id!r}: meta.names: expected a list of the functions that its tests call,"
            f" got {names!r:.80}; tests see a program only through the functions named there"
        )
    setup = str(task.meta.get("setup", ""))
    program = "\n".join(part for part in (setup, program_in(text)) if part)
    return program, TestSuite(tuple(tests), tuple(names), setup)
