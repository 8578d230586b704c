"""`marlora compare PLAN --dry_run`: what each arm may spend, and whether its recipe takes the team,
before anything is played."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from marlora.agents.types import SettingError

from .arms import PlannedRun
from .plan import ComparisonPlan
from .runs import REFUSED, log_of, run_recipe, settings_file

FLAGS = ("--dry_run", "true")
# lines of a recipe's own plan
SHOWN = ("steps ", "engine ", "devices ", "memory ", "nodes ")


def dry_run(plan: ComparisonPlan) -> Iterator[str]:
    """Lines of the plan, then of every arm: its recipe is asked for its own plan, which loads no
    model. Nothing is written into the plan's folder."""
    yield f"comparison   {plan.name}, into {plan.folder}"
    yield f"team         {plan.config.model or 'outside models'} on {plan.config.tasks}"
    limits = plan.limits()
    yield (
        f"budget       {_amounts(limits)} for each run; held-out evaluations are counted, not"
        " limited"
    )
    runs = list(plan.runs())
    yield f"runs         {len(runs)}, which may spend at most {_amounts(limits, len(runs))}"
    for arm in plan.arms.values():
        count = len(arm.seeds)
        control = f", control of {arm.control_of}" if arm.control_of else ""
        yield (
            f"  {arm.name}: {arm.recipe}{control}, {count} seed{'s' * (count > 1)}: at most"
            f" {_amounts(limits, count)}"
        )
        with tempfile.TemporaryDirectory(prefix="marlora-") as scratch:
            elsewhere = copy.copy(plan)
            elsewhere.folder = Path(scratch)  # of settings and logs
            lines = recipe_plan(elsewhere, PlannedRun(arm, arm.seeds[0]))
        yield from (f"    {line}" for line in lines)


def recipe_plan(plan: ComparisonPlan, run: PlannedRun) -> list[str]:
    """What a recipe's own dry run says of steps, devices and memory, or why it refuses. A recipe of
    marlora is asked in this process, a file in one of its own."""
    log = log_of(plan, run)
    if run.arm.recipe.endswith(".py"):
        problem = run_recipe(plan, run, *FLAGS)
    else:
        problem = _asked_here(plan, run, log)
    if problem:
        return [problem]
    with log.open(encoding="utf-8", errors="replace") as file:
        return shown([line.rstrip() for line in file])


def shown(lines: Sequence[str]) -> list[str]:
    """Of a recipe's plan the lines on what it takes, with those that go on below them."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith(SHOWN) or (inside and line.startswith("  "))
        if inside:
            kept.append(line)
    return kept


def _asked_here(plan: ComparisonPlan, run: PlannedRun, log: Path) -> str:
    """Append what the recipe's dry run prints to the log; returns why it refuses, or ""."""
    main = importlib.import_module(f"marlora.recipes.{run.arm.recipe}").main
    before, sys.argv = sys.argv, [run.arm.recipe, "--config", str(settings_file(plan, run)), *FLAGS]
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            main()
    except SettingError as error:
        return f"{REFUSED}: {error}"
    finally:
        sys.argv = before
    return ""


def _amounts(limits: dict[str, float], times: int = 1) -> str:
    return ", ".join(f"{value * times:,.12g} {name}" for name, value in limits.items())
