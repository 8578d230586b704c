"""A run that learnt nothing says so at its end and first in its report, with the setting to
change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Task
from marlora.recipes.launch.tables import summary_table
from marlora.rollouts.report.report import write_report
from marlora.rollouts.types import Episode
from marlora.trainers.errors import RunError
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from tests.trainers import small_run

pytestmark = pytest.mark.usefixtures("one_thread")


def all_alike(task: Task, episode: Episode) -> float:
    return 0.0


def broken(task: Task, episode: Episode) -> float:
    raise KeyError("no such column")


def trainer(folder: Path, model: Path, reward: Any, **changes: Any) -> GRPOTrainer:
    made = small_run.trainer(folder, model, **{"max_steps": 1, **changes})
    return GRPOTrainer(
        system=made.spec.system,
        tasks=made.spec.tasks,
        eval_tasks=made.spec.eval_tasks,
        rewards=[reward],
        args=made.args,
    )


def first_words(folder: Path) -> str:
    page = (folder / "report.html").read_text(encoding="utf-8")
    header = page[page.index("<header") : page.index("</header>")]
    return re.sub(r"<[^>]+>", " ", header[header.index("</h1>") :]).strip()


def test_a_run_of_equal_rewards_says_so_first(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "run"
    summary = trainer(folder, model, all_alike, max_completion_length=4).train()
    assert summary["tokens"]["trained"] == 0
    assert summary["finding"].startswith("This run learnt nothing: ")
    assert "max_completion_length from 4" in summary["finding"] or "reward" in summary["finding"]
    assert summary_table(summary, str(folder)).startswith("This run learnt nothing: ")
    assert first_words(folder).startswith("This run learnt nothing: ")
    kept = (folder / "warnings.log").read_text(encoding="utf-8")
    assert "constant groups 1.00: raise num_generations from 3" in kept
    assert "This run learnt nothing" in kept


def test_a_run_that_learnt_says_nothing_of_it(tmp_path: Path, model: Path) -> None:
    summary = small_run.trainer(tmp_path / "run", model, max_steps=1).train()
    assert "finding" not in summary and summary["tokens"]["trained"] > 0
    assert "learnt nothing" not in first_words(tmp_path / "run")


def test_a_run_whose_episodes_all_failed_tells_why_first(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunError, match="no episode could be scored"):
        trainer(folder, model, broken).train()
    write_report(folder)
    assert first_words(folder).startswith("the run ended after step 0: step 1: no episode could be")
    assert "no such column" in first_words(folder)
