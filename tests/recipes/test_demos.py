"""What a newcomer types: the two demos, then every other command of README and docs, in their
order. Run in the repository itself, in `runs/`. The first line of each program (`marlora`, `python`,
`accelerate`) and what needs a shell is run by one; the others by a process that has made the
imports."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repository import ROOT, clean_environment
from tests.test_readme import tried
from tests.trainers.forks import forked

pytestmark = pytest.mark.slow

KEYS = {"recipe", "model", "engine", "steps", "seconds", "tokens", "policies", "live_proof", "eval"}


def shell(command: str, seconds: float) -> str:
    """Run one line as a user would, in the environment that runs the tests; its output, or an
    assertion with the end of it."""
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=ROOT,
        env=clean_environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def program(line: str) -> list[str]:
    """The module that a line runs and its arguments; none if the line needs a shell."""
    words = shlex.split(line)
    if re.search(r"[&|;<>$]", line):
        return []
    if words[0] == "marlora":
        return ["marlora.recipes.cli.main", *words[1:]]
    if words[:2] == ["python", "-m"]:
        return words[2:]
    if words[:2] == ["accelerate", "launch"]:
        return [f"marlora.recipes.{Path(words[2]).stem}", *words[3:]]
    return []


def test_lines_that_need_no_shell() -> None:
    assert program("accelerate launch recipes/sirius.py --seed 1")[0] == "marlora.recipes.sirius"
    assert program("python -m marlora.recipes.sysdpo -x") == ["marlora.recipes.sysdpo", "-x"]
    assert program("marlora report runs/mine")[1:] == ["report", "runs/mine"]
    assert not program("marlora init mine && cd mine") and not program("python -c 'print(1)'")


def summary(run: str) -> dict[str, Any]:
    """`summary.json` with every pinned key, two moved adapters, and nothing that failed its
    proof."""
    found = json.loads((ROOT / run / "summary.json").read_text())
    assert found.keys() >= KEYS
    assert set(found["seconds"]) >= {"total", "rollout", "train", "publish"} and set(
        found["tokens"]
    ) >= {"sampled", "trained"}
    assert len(found["policies"]) == 2
    for policy in found["policies"].values():
        assert (
            policy["trainable_parameters"] > 0 and policy["sha256_before"] != policy["sha256_after"]
        )
    proof = found["live_proof"]
    assert proof["failed"] == 0 and proof["passed"] >= 2 and proof["max_residual"] <= 0.25
    assert proof["checks"] == proof["passed"] + proof["untrained"]
    for side in ("before", "after"):
        assert set(found["eval"][side]) >= {"accuracy", "ci95", "num_tasks"}
    return found


@pytest.fixture(scope="module")
def tiny_demo() -> dict[str, Any]:
    shell("make demo-tiny", seconds=1500)
    return summary("runs/demo-tiny")


@pytest.mark.timeout(1800)
def test_make_demo_tiny(tiny_demo: dict[str, Any]) -> None:
    assert tiny_demo["engine"] == "transformers" and tiny_demo["eval"]["after"]["num_tasks"] == 200
    assert tiny_demo["eval"]["paired"]["ci95"][0] > 0.25
    for alone in tiny_demo["adapters"].values():
        assert alone["paired"]["ci95"][0] > 0, "each adapter alone is worth something"
        assert alone["accuracy"] < tiny_demo["eval"]["after"]["accuracy"], "and both together more"


@pytest.mark.timeout(1800)
def test_commands_of_the_pages(tiny_demo: dict[str, Any]) -> None:
    shutil.rmtree(ROOT / "runs" / "mine", ignore_errors=True)  # the README makes it
    lines, begun = tried(), set[str]()
    assert len(lines) >= 20
    for line in lines:
        name = line.split()[0]
        module, *arguments = program(line) or [""]
        if module and name in begun:  # else a process of its own, which pays the imports
            done = forked(module, *arguments)
            assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        else:
            shell(line, seconds=600)
            begun.add(name)


@pytest.mark.timeout(1800)
def test_make_demo() -> None:
    """The real model on a real server, cut short; recipes/RESULTS.md has whole runs of three
    seeds."""
    shell(
        'make demo ARGS="--max_steps 1 --tasks_per_step 16 --num_eval_tasks 24 --ablate_adapters'
        ' false"',
        seconds=1700,
    )
    found = summary("runs/demo")
    assert (
        found["engine"] == "vllm"
        and found["steps"] == 1
        and found["eval"]["after"]["num_tasks"] == 24
    )
