"""Scores of answers by math-verify and reasoning-gym, run in the sandbox, since a model's answer
may hang, eat memory, or hold code.

math-verify bounds its time with signals, which work in the main thread only, and sympy under it can
spend minutes on `9^{9^9}`; scorers of reasoning-gym hand text to sympy's parser or to `eval`. So
both run in the sandbox that programs of a model run in (no network, no environment, no files but
Python's own and the packages needed), a fresh process for each answer (`scorer.py`). Where the
sandbox does not work there is no score: `SandboxError`, which ends a run.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import secrets
import select
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...agents.execution import Limits, SandboxError
from ..sandbox.python import IsolatedProcess
from ..sandbox.self_test import isolation

__all__ = ["Checker", "CheckerError", "CheckerTimeout", "equal", "gym_score"]

MEMORY = 4 << 30  # bytes of address space of the scorer and of each of its children
MAX_CHARS = 2000  # a longer answer is not compared as mathematics: no answer we know is that long
MAX_ANSWER = 100_000  # characters of an answer that a set of reasoning-gym scores
MAX_REQUEST = 16 << 20  # bytes of an answer with all its task says
MAX_LINE = 4096  # bytes of a verdict
START = 300.0  # seconds a scorer may take to import what it needs
GRACE = (
    10.0  # seconds beyond its time after which a scorer is given up, its own clock having failed
)
LIVES = 10**9  # seconds of CPU of a scorer; each answer has its own bound
SCORER = Path(__file__).parents[1] / "sandbox" / "scorer.py"
PACKAGES = {"math": "math-verify", "reasoning_gym": "reasoning-gym"}


class CheckerTimeout(RuntimeError):
    """A comparison did not end in its time."""


class CheckerError(RuntimeError):
    """A comparison failed; the message is the scorer's."""


@functools.cache
def packages_of(name: str) -> tuple[str, ...]:
    """Files and folders of an installed package and of all it requires. Raises `SandboxError` if it
    is not installed."""
    dists: dict[str, importlib.metadata.Distribution] = {}
    asked = [name]
    while asked:
        each = re.sub(r"[-_.]+", "-", asked.pop()).lower()
        if each in dists:
            continue
        try:
            dists[each] = importlib.metadata.distribution(each)
        except importlib.metadata.PackageNotFoundError as error:
            if each == name:
                raise SandboxError(
                    f"answers cannot be scored: {name} is not installed; pip install {name}"
                ) from error
            continue  # of another platform, or an extra
        asked += [
            match[0]
            for line in dists[each].requires or ()
            if (match := re.match(r"[\w.-]+", line)) and "extra ==" not in line
        ]
    paths = set()
    for dist in dists.values():
        tops = {
            file.parts[0]
            for file in dist.files or ()
            if len(file.parts) > 1 or file.suffix in (".py", ".so")
        }
        paths |= {str(dist.locate_file(top)) for top in tops - {"..", "__pycache__"}}
    return tuple(sorted(path for path in paths if os.path.isabs(path) and os.path.exists(path)))


class Checker:
    """Client of one scorer process, started at first use, and again after it had to be killed. One
    request at a time."""

    def __init__(self, kind: str, timeout: float) -> None:
        self.kind, self.timeout = kind, timeout
        self._scorer: IsolatedProcess | None = None
        self._requests = self._verdicts = -1
        self._slow: dict[
            str, None
        ] = {}  # answers that ran out of time: a policy that drew one will draw it again
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"checker-{kind}")
        atexit.register(self.stop)

    async def ask(self, setup: Any, key: str, **request: Any) -> float:
        """The scorer's result, from 0 to 1. `setup`: which set scores; `key`: what tells this
        request from others.

        Raises `CheckerTimeout`, `CheckerError` with the scorer's words, or `SandboxError` if it
        cannot be isolated.
        """
        if key in self._slow:
            raise CheckerTimeout(f"not compared within {self.timeout:g} s")
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._ask, setup, request
            )
        except CheckerTimeout:
            while len(self._slow) >= 1000:
                del self._slow[next(iter(self._slow))]
            self._slow[key] = None
            raise

    def stop(self) -> None:
        scorer, self._scorer = self._scorer, None
        if scorer is not None:
            scorer.close()
            os.close(self._requests)
            os.close(self._verdicts)

    def _ask(self, setup: Any, request: dict[str, Any]) -> float:
        if self._scorer is None or self._scorer.process.poll() is not None:
            self._start()
        name = secrets.token_hex(16)
        head = json.dumps({"id": name, "setup": setup, "seconds": self.timeout}).encode()
        whole = head + b"\n" + json.dumps(request).encode()
        if len(whole) > MAX_REQUEST:
            raise CheckerError(f"not compared: more than {MAX_REQUEST} bytes with its task")
        end = time.monotonic() + self.timeout + GRACE
        try:
            self._send(len(whole).to_bytes(8, "big") + whole, end)
            answer = json.loads(self._line(end))
            if answer.pop("id") != name or len(answer) != 1:
                raise ValueError("a verdict of another answer")
        except (OSError, EOFError, ValueError, KeyError) as error:
            self.stop()
            raise CheckerError(
                f"the {self.kind} checker ended ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        except CheckerTimeout:
            self.stop()
            raise
        if "late" in answer:
            raise CheckerTimeout(f"not compared within {self.timeout:g} s")
        if "error" in answer:
            raise CheckerError(str(answer["error"])[:400])
        return float(answer["result"])

    def _start(self) -> None:
        self.stop()
        packages = packages_of(PACKAGES[self.kind])
        limits = Limits(seconds=self.timeout, cpu_seconds=LIVES, memory=MEMORY)
        with contextlib.ExitStack() as theirs:
            ends: list[int] = []
            for ours in (1, 0):  # requests we write, verdicts we read
                pair = os.pipe()
                ends += [pair[ours], pair[1 - ours]]
                theirs.callback(os.close, pair[1 - ours])
            self._requests, requests, self._verdicts, verdicts = ends
            try:
                pipes = {"requests": requests, "verdicts": verdicts}
                self._scorer = IsolatedProcess(
                    isolation(),
                    "scorer",
                    limits,
                    SCORER.read_text("utf-8"),
                    pipes,
                    [self.kind],
                    packages,
                )
            except SandboxError:
                os.close(self._requests)
                os.close(self._verdicts)
                raise
        os.set_blocking(self._requests, False)
        try:
            self._scorer.wait_until_ready(START)
        except SandboxError:
            self.stop()
            raise

    def _send(self, data: bytes, end: float) -> None:
        rest = memoryview(data)
        while rest:
            if not select.select([], [self._requests], [], max(0.0, end - time.monotonic()))[1]:
                raise CheckerTimeout(f"not compared within {self.timeout:g} s")
            rest = rest[os.write(self._requests, rest[:65536]) :]

    def _line(self, end: float) -> bytes:
        read = b""
        while not read.endswith(b"\n"):
            if not select.select([self._verdicts], [], [], max(0.0, end - time.monotonic()))[0]:
                raise CheckerTimeout(f"not compared within {self.timeout:g} s")
            piece = os.read(self._verdicts, MAX_LINE)
            if not piece:
                raise EOFError("end of its output")
            read += piece
            if len(read) > MAX_LINE:
                raise ValueError("a verdict that is too long")
        return read


_math = Checker("math", timeout=3.0)
_gym = Checker("reasoning_gym", timeout=30.0)


async def equal(gold: str, answer: str) -> bool:
    """Are two answers the same mathematically (`1/2` and `0.5`, `x+1` and `1+x`)? False where one
    cannot be read as mathematics.

    Raises `CheckerTimeout` after 3 s, `CheckerError`, and `SandboxError` where the sandbox does not
    work.
    """
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    return bool(await _math.ask(None, json.dumps([gold, answer]), gold=gold, answer=answer))


async def gym_score(name: str, args: dict[str, Any], entry: Any, answer: str) -> float:
    """The score that reasoning-gym's set `name` gives `answer` for `entry` (as `plain` made it)."""
    if len(answer) > MAX_ANSWER:
        raise CheckerError(f"not scored: more than {MAX_ANSWER} characters")
    # Of a slow answer a hash is kept: the task may be large.
    key = hashlib.sha256(json.dumps([name, args, entry, answer]).encode()).hexdigest()
    return await _gym.ask([name, args], key, entry=entry, answer=answer)
