"""`marlora bench sandbox`: what a program costs before it does anything."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import Any

from ...rollouts.sandbox import sandbox as run_in
from ..errors import RunError
from .measure import Options, machine, table


def sandbox(options: Options) -> dict[str, Any]:
    """Median seconds of the smallest program, call and check in the sandbox, beside a bare Python
    that does nothing."""
    exam = run_in.Exam(("assert f(2) == 4",), ("f",))

    async def answer(text: str) -> str:
        return text

    async def once() -> dict[str, float]:
        found = {}
        for name, start in (
            ("workflow program", lambda: run_in.run("1 + 1", {})),
            (
                "workflow program, ten calls",
                lambda: run_in.run(
                    "for _ in range(10):\n    await answer('x')", {"answer": answer}
                ),
            ),
            ("plain Python", lambda: run_in.run("print(2)")),
            ("check, two processes", lambda: run_in.check("def f(x): return x * x", exam)),
            (
                "bare Python",
                lambda: asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", "-c", "print(2)", stdout=-3
                ),
            ),
        ):
            begun = time.perf_counter()
            done = await start()
            if isinstance(done, asyncio.subprocess.Process):
                await done.wait()
            elif not (done.passed if isinstance(done, run_in.Verdict) else done.ok):
                raise RunError(f"bench sandbox: {name} ended with {done}; no time is given")
            found[name] = time.perf_counter() - begun
        return found

    async def several() -> list[dict[str, float]]:
        return [await once() for _ in range(options.repeats + 1)][
            1:
        ]  # the first proves the cage and starts a worker

    results, where = asyncio.run(several()), machine()
    median = {name: statistics.median(each[name] for each in results) for name in results[0]}
    bare = median["bare Python"]
    rows = [
        [
            name,
            *(
                f"{1000 * value:.1f}"
                for value in (
                    median[name],
                    min(r[name] for r in results),
                    max(r[name] for r in results),
                )
            ),
        ]
        for name in median
    ]
    return {
        "suite": "sandbox",
        **where,
        "held": run_in.state()[0],
        "results": results,
        "median": median,
        "over_bare_python": {name: value / bare for name, value in median.items()},
        **table(
            f"sandbox: {run_in.state()[0]}", ["what", "median, ms", "smallest", "largest"], rows
        ),
    }
