"""`marlora bench sandbox`: start-up cost of programs in the sandbox."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ...rollouts.sandbox import sandbox as run_in
from ..errors import RunError
from .measure import Options, machine, table

TESTS = run_in.TestSuite(("assert f(2) == 4",), ("f",))
CALLS = "for _ in range(10):\n    await answer('x')"
BARE = (sys.executable, "-I", "-S", "-c", "print(2)")


async def _answer(text: str) -> str:
    return text


# what is timed, by name; each starts anew
WORK: dict[str, Callable[[], Awaitable[Any]]] = {
    "workflow program": lambda: run_in.run("1 + 1", {}),
    "workflow program, ten calls": lambda: run_in.run(CALLS, {"answer": _answer}),
    "plain Python": lambda: run_in.run("print(2)"),
    "check, two processes": lambda: run_in.check("def f(x): return x * x", TESTS),
    "bare Python": lambda: asyncio.create_subprocess_exec(*BARE, stdout=-3),
}


def sandbox(options: Options) -> dict[str, Any]:
    """Median seconds of the smallest program, call and check in the sandbox, beside a bare Python
    that does nothing."""
    results, where = asyncio.run(_laps(options.repeats)), machine()
    median = {name: statistics.median(each[name] for each in results) for name in WORK}
    rows = []
    for name, middle in median.items():
        values = [lap[name] for lap in results]
        rows.append([name, *(f"{1000 * s:.1f}" for s in (middle, min(values), max(values)))])
    columns = ["what", "median, ms", "smallest", "largest"]
    return {
        "suite": "sandbox",
        **where,
        "held": run_in.state()[0],
        "results": results,
        "median": median,
        "over_bare_python": {name: s / median["bare Python"] for name, s in median.items()},
        **table(f"sandbox: {run_in.state()[0]}", columns, rows),
    }


async def _laps(repeats: int) -> list[dict[str, float]]:
    """Seconds of every kind of work, so many times; a first lap, which tests the sandbox and starts
    a worker, is left out."""
    laps = [
        {name: await _seconds(name, start) for name, start in WORK.items()}
        for _ in range(repeats + 1)
    ]
    return laps[1:]


async def _seconds(name: str, start: Callable[[], Awaitable[Any]]) -> float:
    """Raises `RunError` if the work fails."""
    begun = time.perf_counter()
    done = await start()
    if isinstance(done, asyncio.subprocess.Process):
        await done.wait()
    elif not (done.passed if isinstance(done, run_in.TestResult) else done.ok):
        raise RunError(f"bench sandbox: {name} ended with {done}; no time is given")
    return time.perf_counter() - begun
