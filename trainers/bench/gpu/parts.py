"""One part of `marlora bench gpu` in a process of its own: `python -m
marlora.trainers.bench.gpu.parts NAME OPTIONS`, where the options are JSON. A line of JSON on stdout
for every result, as soon as it is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..measure import Options
from .serving import LeftOut, adapters_part, loop_part
from .training import head_part, trees_part, update_part
from .work import Work, work_of

RESULT = "RESULT "  # what a line with a result begins with
CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Part:
    """A part: `run` yields (name, what was measured, `says` in one line); `limit`: seconds
    that it has at least."""

    name: str
    run: Callable[[Options, Work], Iterator[tuple[str, dict[str, Any]]]]
    limit: float


def tests_part(options: Options, work: Work) -> Iterator[tuple[str, dict[str, Any]]]:
    """`make test-gpu` of the checkout. Raises `LeftOut` without a GPU or without the tests."""
    if options.device == "cpu":
        raise LeftOut("no GPU is seen here")
    if not (CHECKOUT / "tests" / "test_gpu.py").is_file():
        raise LeftOut("the tests are no part of an installed marlora; run this from a checkout")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    yield "make test-gpu", {"exit": done.returncode, "output": done.stdout[-4000:], "says": last}
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {last}")


# In this order: what is cheap, or tells whether the rest means anything, comes first. Together at
# most `hour.MOST`.
PARTS = (
    Part("tests", tests_part, 90.0),
    Part("head", head_part, 40.0),
    Part("update", update_part, 90.0),
    Part("trees", trees_part, 80.0),
    Part("adapters", adapters_part, 160.0),
    Part("loop", loop_part, 130.0),
)


def main(name: str, options: Options) -> None:
    """Print the results of a part. Exits with 3 and the reason where it cannot run."""
    # Ended by SIGTERM when its time is over: servers and scratch folders go with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    part = next(part for part in PARTS if part.name == name)
    try:
        for key, value in part.run(options, work_of(options)):
            print(RESULT + json.dumps([key, value]), flush=True)
    except LeftOut as why:
        print(RESULT + json.dumps(["left out", {"says": str(why)}]), flush=True)
        sys.exit(3)


def command(part: Part, options: Options) -> list[str]:
    """The command line of a part's process."""
    return [sys.executable, "-m", __name__, part.name, json.dumps(asdict(options))]


def options_of(text: str) -> Options:
    """Options from their JSON."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }
    return Options(**values)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
    main(sys.argv[1], options_of(sys.argv[2]))
