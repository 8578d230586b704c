"""`marlora compare`: methods side by side on one team, one task set and one budget, by a plan."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint.team import say
from marlora.recipes.launch.settings import import_from, import_from_here
from marlora.rollouts import files
from marlora.trainers.errors import RunError

if TYPE_CHECKING:
    from marlora.recipes.compare.plan import ComparisonPlan

ARRAY, WHOLE = "slurm/compare_array.sbatch", "slurm/compare.sbatch"


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `marlora compare`."""
    parser.add_argument("plan", help="YAML file: team, tasks, budget, seeds, arms")
    what = parser.add_mutually_exclusive_group()
    for name, help in (
        ("dry_run", "print what each arm may spend and whether its recipe takes the team"),
        ("headroom", "only measure what there is to gain, and whether so many tasks can show it"),
        ("so_far", "start no run: write the page of those that have ended"),
        ("slurm", "submit the runs as an array of Slurm jobs, and the page as a job after them"),
    ):
        what.add_argument(f"--{name}", action="store_true", help=help)
    what.add_argument(
        "--part", type=int, default=None, help="run only this one of the plan's runs, from 0"
    )
    parser.add_argument("--json", default="", help="write the numbers here too")
    parser.add_argument("--markdown", default="", help="write the tables here too")


def cmd_compare(args: argparse.Namespace) -> None:
    """Run any methods on one team, one task set and one budget, and say what each is worth; goes on
    where it was stopped."""
    from marlora.recipes.compare import comparison
    from marlora.recipes.compare.dry_run import dry_run
    from marlora.recipes.compare.plan import read_plan

    # a team of one's own stands beside the plan, or here; the runs are processes of their own
    folder = Path(args.plan).absolute().parent
    import_from(folder)
    import_from_here()
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), known]))
    plan = read_plan(args.plan)
    check_outputs(plan, args.json, args.markdown)
    if args.dry_run:
        for line in dry_run(plan):
            print(line, flush=True)
    elif args.headroom:
        print(comparison.measure_headroom(plan)["summary"])
    elif args.slurm:
        outputs = [("--json", args.json), ("--markdown", args.markdown)]
        submit(plan, args.plan, [word for flag in outputs if flag[1] for word in flag])
    elif args.part is not None:
        comparison.compare_part(plan, args.part, say)
    else:
        whole(plan, args)


def whole(plan: ComparisonPlan, args: argparse.Namespace) -> None:
    """Compare, print and write the tables. Raises `RunError` at the end if a run has no result."""
    from marlora.recipes.compare import comparison, tables

    result = comparison.compare_arms(plan, say, args.so_far)
    print(tables.as_text(result))
    for path, content in (
        (args.json, lambda: json.dumps(result, indent=2) + "\n"),
        (args.markdown, lambda: tables.as_markdown(result)),
    ):
        if path:
            files.write_text(Path(path), content())
    say(f"{plan.folder / comparison.PAGE}")
    comparison.check_complete(result)


def check_outputs(plan: ComparisonPlan, numbers: str, markdown: str) -> None:
    """Raise `SettingError` for a file that cannot be written, or that holds another plan's
    numbers."""
    from marlora.recipes.compare.comparison import check_same

    for flag, path in (("json", numbers), ("markdown", markdown)):
        if path and not Path(path).absolute().parent.is_dir():
            raise SettingError(f"--{flag} {path}: no such folder")
    if not (numbers and Path(numbers).is_file()):
        return
    try:
        before = json.loads(Path(numbers).read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"--json {numbers}: is there and no comparison's; name another"
        ) from error
    check_same(before, plan.identity(), f"--json {numbers}")


def submit(
    plan: ComparisonPlan,
    path: str,
    outputs: Sequence[str] = (),
    call: Callable[[list[str]], str] | None = None,
) -> None:
    """Submit the array, and the job that writes the page once all of it has ended, well or not.

    `outputs`: --json and --markdown with their files, for that job. `call`: gives what sbatch
    prints for these words (tests). Raises `RunError` without Slurm, with the commands.
    """
    last = len(list(plan.runs())) - 1
    array = ["sbatch", "--parsable", f"--array=0-{last}", ARRAY, path]
    if call is None and not Path(ARRAY).is_file():
        raise RunError(f"--slurm: no {ARRAY} here; marlora slurm init writes the job files")
    if call is None and shutil.which("sbatch") is None:
        raise RunError(
            "--slurm: no sbatch on this machine; on a cluster's login node, in the repository:"
            f" {shlex.join(array)}, then sbatch --dependency=afterany:JOB"
            f" {shlex.join([WHOLE, path, *outputs])}"
        )
    job = (call or printed)(array).strip().partition(";")[0]
    whole_job = ["sbatch", "--parsable", f"--dependency=afterany:{job}", WHOLE, path, *outputs]
    after = (call or printed)(whole_job)
    print(f"jobs {job} (runs 0 to {last}) and {after.strip()} (the page): {plan.folder}")


def printed(words: list[str]) -> str:
    """What a command prints. Raises `RunError` with its error."""
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RunError(f"{shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout
