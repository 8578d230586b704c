"""Runs as processes: exit codes and errors, a kill and a resume, and the array of Slurm jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.cli.compare import ARRAY, WHOLE, check_outputs, submit
from marlora.recipes.compare import comparison, processes, runs
from marlora.recipes.compare.plan import ComparisonPlan
from marlora.recipes.compare.result import VERSION
from marlora.trainers.errors import RunError
from tests.recipes.compare.plans import SFT, plan_of, written
from tests.recipes.compare.test_comparison import in_process
from tests.repository import ROOT


def until(holds: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def running(words: str) -> list[int]:
    """Processes whose command line holds these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if words in line:
            found.append(int(path.parent.name))
    return found


@pytest.mark.process
def test_a_recipe_that_fails_says_why(tmp_path: Path) -> None:
    """Exit code 2 is a refusal; the reason is its line `error: ...`, of this attempt only."""
    recipe = tmp_path / "mine.py"
    plan = ComparisonPlan("p", plan_of(tmp_path / "out"))
    recipe.write_text("print('error: first try'); raise SystemExit(1)", encoding="utf-8")
    arms = {"mine": {"recipe": str(recipe)}}
    plan = ComparisonPlan("p", plan_of(tmp_path / "out", arms=arms))
    (run,) = plan.runs()
    assert runs.run_recipe(plan, run) == "failed (exit code 1): first try"
    recipe.write_text(
        "import sys; sys.stderr.write('error: no edges\\nbye\\n'); sys.exit(2)", encoding="utf-8"
    )
    assert runs.run_recipe(plan, run) == f"{runs.REFUSED}: no edges"
    recipe.write_text("import sys; assert sys.argv[1] == '--config'", encoding="utf-8")
    assert runs.run_recipe(plan, run) == ""
    log = runs.log_of(plan, run).read_text(encoding="utf-8")
    assert log.count("$ ") == 3


@pytest.mark.process
def test_a_stopped_comparison_stops_its_run(tmp_path: Path) -> None:
    """SIGTERM and SIGUSR1 of a cluster reach the run as SIGTERM, on which recipes save; then the
    comparison ends as interrupted."""
    recipe = tmp_path / "mine.py"
    mark = tmp_path / "saved"
    recipe.write_text(
        "import signal, sys, time\n"
        f"def save(*_): open({str(mark)!r}, 'w').close(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(100)\n",
        encoding="utf-8",
    )
    log = tmp_path / "log"
    program = (
        "import sys; from pathlib import Path\n"
        "from marlora.recipes.compare.runs import supervised\n"
        f"supervised([sys.executable, {str(recipe)!r}], Path({str(log)!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    until(lambda: log.is_file() and "ready" in log.read_text(encoding="utf-8"), "the run starts")
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in error
    assert mark.exists() and not running(str(recipe))


MINE = """
import os, pathlib, signal, sys, time

def main():
    task, folder = sys.argv[1:]
    print(task, sys.argv[0], flush=True)
    if task == "fail":
        raise SystemExit(2)
    if task == "die":
        os.kill(os.getpid(), 9)
    if task == "wait":
        def save(*_):
            pathlib.Path(folder, "saved").touch()
            sys.exit(1)

        signal.signal(signal.SIGTERM, save)
        pathlib.Path(folder, "pid.new").write_text(str(os.getpid()), encoding="utf-8")
        os.rename(pathlib.Path(folder, "pid.new"), pathlib.Path(folder, "pid"))
        time.sleep(1000)
"""


IMPORTS = ("marlora.recipes.launch.processes", "marlora.trainers.distributed.ranks")  # of `run`


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """The command of a recipe `mine`, by its task."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else numpy's import leaves threads: no fork
    monkeypatch.setattr(processes, "IMPORTS", IMPORTS)
    return lambda task: [sys.executable, "-m", "mine", task, str(tmp_path)]


def not_forked(words: Sequence[str], log: Path) -> int:
    raise AssertionError(f"{words} was not forked")


@pytest.mark.process
def test_forked_runs_end_as_processes_of_their_own_do(
    tmp_path: Path, forked: Callable[[str], list[str]]
) -> None:
    """Exit codes and logs, one after the other from one process; where that is killed the run in it
    dies too, and the next one has another."""
    log = tmp_path / "log"
    with contextlib.closing(processes.Forks(not_forked)) as start:
        codes = [start(forked(task), log) for task in ("fail", "die", "pass")]
        assert codes == [2, 137, 0]
        server = start._server
        assert server is not None

        def kill() -> None:
            until((tmp_path / "pid").is_file, "it waits")
            server.kill()

        watcher = threading.Thread(target=kill)
        watcher.start()
        assert start(forked("wait"), log) == 137
        watcher.join()
        run = int((tmp_path / "pid").read_text(encoding="utf-8"))
        until(lambda: not Path(f"/proc/{run}").exists(), "the run dies with it")
        assert start(forked("pass"), log) == 0 and start._server is not server
    lines = log.read_text(encoding="utf-8").splitlines()
    module = str(tmp_path / "mine.py")
    tasks = ("fail", "die", "pass", "wait", "pass")
    assert lines == [f"{task} {module}" for task in tasks]


@pytest.mark.slow
@pytest.mark.process
def test_a_stopped_comparison_stops_its_forked_run(
    tmp_path: Path, forked: Callable[[str], list[str]]
) -> None:
    """As one that is a process of its own: the run saves, then the comparison is interrupted."""
    program = (
        "import contextlib; from pathlib import Path\n"
        "from marlora.recipes.compare import processes\n"
        f"processes.IMPORTS = {IMPORTS}\n"
        "with contextlib.closing(processes.Forks(processes.supervised)) as start:\n"
        f"    start({forked('wait')!r}, Path({str(tmp_path / 'log')!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    until((tmp_path / "pid").is_file, "the run starts")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode != 0 and "KeyboardInterrupt" in error
    assert (tmp_path / "saved").exists()
    assert not running(f"{processes.__name__} {process.pid}")


@pytest.mark.slow
@pytest.mark.process
def test_what_cannot_be_forked_is_a_process_of_its_own(
    tmp_path: Path, forked: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe in a file; and every run once imports have left a thread."""
    started: list[str] = []

    def other(words: Sequence[str], log: Path) -> int:
        started.append(words[-2])
        return 7

    (tmp_path / "threads.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(processes, "IMPORTS", (*IMPORTS, "threads"))
    with contextlib.closing(processes.Forks(other)) as start:
        assert start([sys.executable, "mine.py", "file", ""], tmp_path / "log") == 7
        assert start._server is None
        assert start(forked("first"), tmp_path / "log") == 7
        assert start.refused == "imports have left 2 threads"
        assert start(forked("second"), tmp_path / "log") == 7
    assert started == ["file", "first", "second"]


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("steps", "tokens", "budget", "eval", "policies")}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("several", [False, True])
def test_a_comparison_that_was_killed_goes_on_where_it_was(
    several: bool, model: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the command ends the run's process too, and one that was forked as well; a second
    call finishes it, step for step and token for token as one that was not killed, within the same
    budget."""
    arms = {"sft": {**SFT, "settings": {**SFT["settings"], "max_steps": 10}}}
    if several:
        arms["more"] = SFT
    plan = plan_of(tmp_path / "cut", model, arms=arms)
    path = written(tmp_path / "plan.yaml", plan)
    words = [sys.executable, "-m", "marlora.recipes.cli.main", "compare", str(path)]
    words += [] if several else ["--part", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    folder = tmp_path / "cut" / "runs" / "sft" / "seed-0"
    rows = folder / "metrics.jsonl"
    try:
        until(lambda: rows.is_file() and rows.read_text(encoding="utf-8") != "", "the first step")
    finally:
        process.kill()
        process.wait()
    settings = str(tmp_path / "cut" / "settings")
    until(lambda: not running(settings), "the run ends with the command")
    forks = f"{processes.__name__} {process.pid}"
    until(lambda: not running(forks), "the run ends with the command")
    assert not (folder / "summary.json").exists(), "it was killed too late to show anything"
    monkeypatch.setattr(runs, "supervised", in_process)
    comparison.compare_part(ComparisonPlan("p", plan), 0, lambda line: None)
    whole = ComparisonPlan("p", {**plan, "output_dir": str(tmp_path / "whole")})
    comparison.compare_part(whole, 0, lambda line: None)
    first, second = facts(folder), facts(tmp_path / "whole" / "runs" / "sft" / "seed-0")
    assert first == second and first["steps"] == 10
    assert 0 < first["budget"]["spent"]["tokens"] <= 10000


# the array


def test_the_array_has_a_job_for_every_run_and_one_for_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ComparisonPlan("p", plan_of(tmp_path, seeds=[0, 1, 2], arms={"a": SFT, "b": SFT}))
    calls: list[list[str]] = []

    def sbatch(words: list[str]) -> str:
        calls.append(words)
        return f"{40 + len(calls)};cluster\n"

    submit(plan, "plans/p.yaml", ["--json", "out/p.json"], sbatch)
    assert calls == [
        ["sbatch", "--parsable", "--array=0-5", ARRAY, "plans/p.yaml"],
        [
            "sbatch",
            "--parsable",
            "--dependency=afterany:41",
            WHOLE,
            "plans/p.yaml",
            "--json",
            "out/p.json",
        ],
    ]
    assert "jobs 41 (runs 0 to 5) and 42" in capsys.readouterr().out
    assert (ROOT / ARRAY).is_file() and (ROOT / WHOLE).is_file()


def test_without_slurm_the_commands_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=f"no sbatch on this machine.*--array=0-0 {ARRAY} p.yaml"):
        submit(ComparisonPlan("p", plan_of(tmp_path)), "p.yaml")


@pytest.mark.parametrize(("name", "task"), [("compare_array", "3"), ("compare", "")])
def test_jobs_call_the_command_and_go_back_into_the_queue(
    name: str, task: str, tmp_path: Path
) -> None:
    """The job's shell with a program that prints its arguments in the place of Python."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "MARLORA_PYTHON": str(program)}
    env |= {"SLURM_ARRAY_TASK_ID": task} if task else {}
    job = ROOT / "slurm" / f"{name}.sbatch"
    done = subprocess.run(
        ["bash", str(job), "plan.yaml"], capture_output=True, text=True, env=env, cwd=ROOT
    )
    part = " --part 3" if task else ""
    assert done.stdout == f"-m marlora.recipes.cli.main compare plan.yaml{part}\n", done.stderr
    assert "#SBATCH --requeue" in job.read_text(encoding="utf-8")
    assert "#SBATCH --signal=B:USR1@180" in job.read_text(encoding="utf-8")


# files of other plans


def test_numbers_of_another_plan_are_not_overwritten(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    plan = ComparisonPlan("p", plan_of(tmp_path))
    check_outputs(plan, str(numbers), "")
    numbers.write_text(
        json.dumps({"version": VERSION, "identity": plan.identity()}), encoding="utf-8"
    )
    check_outputs(plan, str(numbers), "")
    other = ComparisonPlan("p", plan_of(tmp_path, budget={"calls": 100}))
    with pytest.raises(SettingError, match=r"--json .*: holds the comparison of another plan"):
        check_outputs(other, str(numbers), "")
    numbers.write_text('{"accuracy": 1}', encoding="utf-8")
    with pytest.raises(SettingError, match="no comparison's"):
        check_outputs(plan, str(numbers), "")
    with pytest.raises(SettingError, match="no such folder"):
        check_outputs(plan, "", str(tmp_path / "nowhere" / "table.md"))
