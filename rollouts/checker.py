"""A second process that compares answers, because what a model wrote may hang, eat memory, or hold code.

math-verify bounds its time with signals, which work in the main thread only, and sympy under it can spend minutes on `9^{9^9}`; scorers
of reasoning-gym hand text to sympy's parser, which evaluates it. Both run in a child of ours: killed when its time is up, with a
bounded address space, refused files to write, processes and sockets. This guards against accidents and simple attacks; it is no
sandbox, and nothing of a model's is ever run here on purpose.

`python -m marlora.rollouts.checker math|reasoning_gym` is the child: a JSON line in, a JSON line out.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MEMORY = 4 << 30  # bytes of address space of a child
MAX_CHARS = 2000  # a longer answer is not compared: no answer we know is that long
START = 300.0  # seconds a child may take to import what it needs
FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "tempfile.", "webbrowser.")
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


class CheckerTimeout(RuntimeError):
    """A comparison did not end in its time."""


class CheckerError(RuntimeError):
    """A comparison failed; the message is the child's."""


class Checker:
    """The parent's end of one child, started at first use, and again after it had to be killed. One request at a time."""

    def __init__(self, kind: str, timeout: float) -> None:
        self.kind, self.timeout = kind, timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"checker-{kind}")
        atexit.register(self.stop)

    async def ask(self, **request: Any) -> Any:
        """The child's result. Raises `CheckerTimeout`, or `CheckerError` with the child's words."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, request)

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            if self._child is None or self._child.poll() is not None:
                self._start()
            self._send(json.dumps(request).encode() + b"\n")
            answer = json.loads(self._line(self.timeout))
        except (OSError, EOFError, ValueError) as error:
            self.stop()
            raise CheckerError(f"the {self.kind} checker ended ({type(error).__name__}: {error})") from error
        except CheckerTimeout:
            self.stop()
            raise
        if "error" in answer:
            raise CheckerError(answer["error"])
        return answer["result"]

    def _start(self) -> None:
        self.stop()
        # -P: a file in the working folder must not stand in for a module. Threads of BLAS would fill the address space.
        command = [sys.executable, "-P", "-B", "-m", "marlora.rollouts.checker", self.kind]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0, env=env)
        self._line(START)

    def _send(self, line: bytes) -> None:
        assert self._child is not None and self._child.stdin is not None
        self._child.stdin.write(line)

    def _line(self, timeout: float) -> bytes:
        assert self._child is not None and self._child.stdout is not None
        handle, end, read = self._child.stdout.fileno(), time.monotonic() + timeout, b""
        while not read.endswith(b"\n"):
            if not select.select([handle], [], [], max(0.0, end - time.monotonic()))[0]:
                raise CheckerTimeout(f"not compared within {timeout:g} s")
            piece = os.read(handle, 65536)
            if not piece:
                raise EOFError("end of its output")
            read += piece
        return read


_math = Checker("math", timeout=3.0)
_gym = Checker("reasoning_gym", timeout=30.0)
_slow: dict[tuple[str, str], None] = {}  # comparisons that ran out of time: a policy that found one will say it again


async def equal(gold: str, answer: str) -> bool:
    """Are two answers the same mathematically (`1/2` and `0.5`, `x+1` and `1+x`)? False where one cannot be read as mathematics.

    Raises `CheckerTimeout` after 3 s, and `CheckerError`.
    """
    if max(len(gold), len(answer)) > MAX_CHARS:
        return False
    if (gold, answer) in _slow:
        raise CheckerTimeout(f"not compared within {_math.timeout:g} s")
    try:
        return bool(await _math.ask(gold=gold, answer=answer))
    except CheckerTimeout:
        while len(_slow) >= 1000:
            del _slow[next(iter(_slow))]
        _slow[gold, answer] = None
        raise


async def gym_score(name: str, args: dict[str, Any], entry: Any, answer: str) -> float:
    """The score that reasoning-gym's set `name` gives `answer` for `entry` (as `plain` made it)."""
    return float(await _gym.ask(name=name, args=args, entry=entry, answer=answer))


def plain(value: Any) -> Any:
    """Python values as JSON values from which `unplain` restores them: tuples, sets and keys that are not text survive."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[plain(key), plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [plain(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((plain(item) for item in value), key=repr)}
    if value is None or isinstance(value, (str, int, float)):
        return value
    return {"text": str(value)}


def unplain(value: Any) -> Any:
    if isinstance(value, list):
        return [unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {unplain(key): unplain(item) for key, item in inner}
    return inner if kind == "text" else {"tuple": tuple, "set": set}[kind](unplain(item) for item in inner)


# the child


def _math_worker() -> Callable[[dict[str, Any]], Any]:
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        return parse(text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None)

    def work(request: dict[str, Any]) -> bool:
        gold, answer = parsed(request["gold"]), parsed(request["answer"])
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))

    work({"gold": "\\frac{1}{2}", "answer": "0.5"})  # builds the grammar, which takes a while
    return work


def _gym_worker() -> Callable[[dict[str, Any]], Any]:
    import reasoning_gym

    made: dict[str, Any] = {}

    def work(request: dict[str, Any]) -> float:
        key = json.dumps([request["name"], request["args"]], sort_keys=True)
        if key not in made:
            made[key] = reasoning_gym.create_dataset(request["name"], **request["args"])
        return float(made[key].score_answer(answer=request["answer"], entry=unplain(request["entry"])))

    return work


def _guard(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and (set(str(args[1] or "")) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes or (event.startswith(FORBIDDEN) and event not in ALLOWED):
        raise PermissionError(f"{event} is refused in a checker")


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")  # a private copy: what a library prints must not get among the answers
    os.dup2(2, 1)
    work = {"math": _math_worker, "reasoning_gym": _gym_worker}[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_guard)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(60)  # ends this process if the parent, which would have killed it, is gone
        try:
            answer = {"result": work(json.loads(line))}
        except Exception as error:  # whatever a scorer raises goes to the parent, in words
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
