"""Runs of the arms: each is a process of its recipe in a folder of its own, which goes on where it
was stopped and is not run again once it has a summary."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from marlora.rollouts import files
from marlora.rollouts.budget import ROUNDING
from marlora.rollouts.report.episode_index import json_lines
from marlora.rollouts.report.run_data import read_json
from marlora.trainers.loop.changed_settings import OF_ONE_CALL, changed, settings_of

from .arms import PlannedRun
from .plan import ComparisonPlan
from .processes import Forks, Start, supervised

LAST = 2000  # characters of the end of a log in which its error is looked for
OTHER_RUN = "holds a run of other settings, which is neither taken for this one nor changed"
NOT_RUN = "not run to its end yet"
REFUSED = "the recipe does not take the plan's team or settings"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a run. problem: why there is no result, "" if there is one."""

    run: PlannedRun
    problem: str = ""


def other_settings(plan: ComparisonPlan, run: PlannedRun) -> str:
    """How a run that stands in this run's folder differs from what the plan asks for, "" if it does
    not, as far as its config.yaml says (where it stands there in another form, it says nothing)."""
    own = settings_of(run.folder)
    differ = [
        f"{where} is {was!r} there, {now!r} in the plan"
        for where, (now, was) in changed(plan.settings_of(run), own).items()
        if where.partition(".")[0] not in OF_ONE_CALL
        and _of_one_form(now, was)
        and not (where == "rewards" and was[: len(now)] == now)  # its trainer scores more
    ]
    recipe = own.get("recipe")
    if recipe and not run.arm.recipe.endswith(".py") and recipe != run.arm.recipe:
        differ.insert(0, f"recipe is {recipe!r} there, {run.arm.recipe!r} in the plan")
    return "; ".join(differ)


def _of_one_form(now: Any, was: Any) -> bool:
    """Whether two values of a setting can be compared: both numbers, or texts, or lists of such."""
    if isinstance(now, list) and isinstance(was, list):
        return len(now) != len(was) or all(map(_of_one_form, now, was))
    numbers = all(isinstance(each, (int, float)) for each in (now, was))
    return numbers or (isinstance(now, str) and isinstance(was, str))


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has ended and said what came out: a summary of its last step."""
    summary = read_json(run.folder / "summary.json")
    steps = [row["step"] for row in json_lines(run.folder / "metrics.jsonl")]
    return summary is not None and max(steps, default=0) <= summary["steps"]


def run_arms(plan: ComparisonPlan, runs: Sequence[PlannedRun], say: Say) -> list[Outcome]:
    """Run these one after the other; one that fails does not keep the others from running."""
    outcomes = []
    with contextlib.closing(Forks(supervised)) as forks:
        start = forks if len(runs) > 1 else supervised
        for number, run in enumerate(runs, 1):
            head = f"[{number}/{len(runs)}] {run.name}"
            if outcome := stands(plan, run):
                say(f"{head}: {outcome.problem or 'finished before'}")
                outcomes.append(outcome)
                continue
            say(f"{head}: {run.arm.recipe}, into {run.folder}")
            problem = run_recipe(plan, run, start=start)
            say(f"{head}: {problem or 'finished'}")
            outcomes.append(Outcome(run, problem))
    return outcomes


def outcomes_so_far(plan: ComparisonPlan) -> list[Outcome]:
    """What became of all runs of the plan up to now; none is started."""
    return [stands(plan, run) or Outcome(run, NOT_RUN) for run in plan.runs()]


def stands(plan: ComparisonPlan, run: PlannedRun) -> Outcome | None:
    """What stands in a run's folder, if that has ended or is another run's; None if there is
    something to run."""
    if differs := other_settings(plan, run):
        return Outcome(run, f"{run.folder} {OTHER_RUN}: {differs}")
    return Outcome(run) if is_finished(run) else None


def run_recipe(
    plan: ComparisonPlan, run: PlannedRun, *flags: str, start: Start | None = None
) -> str:
    """Run a recipe to its end in a process of its own, which `start` starts (`supervised` by
    default); returns why it failed, "" if it did not.

    Raises `KeyboardInterrupt` on Ctrl-C, SIGTERM and SIGUSR1 (which clusters send before the time
    limit), once the run has saved its last finished step.
    """
    log = log_of(plan, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {run.arm.recipe} {' '.join(flags)}\n")
        begins = file.tell()
    code = (start or supervised)([*command(plan, run), *flags], log)
    if code == 0:
        return ""
    kind = REFUSED if code == 2 else f"failed (exit code {code})"
    return f"{kind}: {error_in(log, begins)}"


def command(plan: ComparisonPlan, run: PlannedRun) -> list[str]:
    """The words that start a run."""
    recipe = run.arm.recipe
    program = [recipe] if recipe.endswith(".py") else ["-m", f"marlora.recipes.{recipe}"]
    return [sys.executable, *program, "--config", str(settings_file(plan, run))]


def settings_file(plan: ComparisonPlan, run: PlannedRun) -> Path:
    """The file of a run's settings, written anew."""
    path = plan.folder.resolve() / "settings" / f"{run.arm.name}-seed-{run.seed}.yaml"
    files.write_text(path, yaml.safe_dump(plan.settings_of(run), sort_keys=False))
    return path


def log_of(plan: ComparisonPlan, run: PlannedRun) -> Path:
    """What a run prints."""
    return plan.folder / "logs" / f"{run.arm.name}-seed-{run.seed}.log"


def error_in(log: Path, start: int) -> str:
    """The error that a run ended with: its line `error: ...`, else the last line of the log."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read()[-LAST:].splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]


def over_budget(plan: ComparisonPlan, run: PlannedRun) -> str:
    """What a finished run has spent above the budget, "" if nothing."""
    summary = read_json(run.folder / "summary.json") or {}
    spent = (summary.get("budget") or {}).get("spent") or {}
    for name, limit in plan.limits().items():
        if spent.get(name, 0) > limit * (1 + ROUNDING):
            return f"{name}: {spent[name]:,.12g} of {limit:,.12g}"
    return ""
