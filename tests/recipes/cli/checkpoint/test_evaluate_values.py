"""`marlora eval` where values were learnt: the trained team has them, the base team those that the
run began with. The answers follow from the values alone, so every accuracy is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.state import Param
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.transcript import Output
from marlora.agents.types import Task
from marlora.recipes.cli.main import main
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = "tests.recipes.cli.checkpoint.test_evaluate_values"


@dataclass
class Reader(System):
    """Says the value `number`, and beside it the last digit of the agent's system message; whatever
    the model answers."""

    def params(self) -> tuple[Param, ...]:
        number = Param("number", "0", "program", role="the digit to say")
        return (*super().params(), number)

    async def run(self, task: Task, team: Team) -> Output:
        turn = await team["solver"].reply(task.prompt)
        heads = [m.content for m in turn.messages if m.role == "system"]
        digit = heads[0][-1] if heads else "0"
        return Output(f"{team.values.get('number', '0')}{digit}", [turn])


def tasks(split: str, seed: int = 0, **_: Any) -> list[Task]:
    """Ten held-out tasks, with the answers 0 to 9."""
    count = 10 if split == "eval" else 3
    return [Task(f"{split}{n}", f"{split} {n}", n, split=split) for n in range(count)]


def worth(task: Task, episode: Episode) -> float:
    """1 where both digits are at most the answer: small digits solve many tasks."""
    text = episode.output or ""
    return float(text.isdecimal() and max(map(int, text)) <= task.answer)


class Learner(Trainer[RunConfig]):
    """Its only step puts in the values of `found`."""

    Config = RunConfig
    found: Mapping[str, Any] = {}

    def step(self, step: int) -> StepResult:
        return StepResult({}, state=self.run.state.with_values(self.found))


def learnt(folder: Path, model: Path, found: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The summary of a run that begins with `number` 7 and the prompt `Say 6` and finds `found`."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        policies={"solver": {"trainable": False}},
        values={"number": "7", "solver.prompt": "Say 6"},
        tasks=f"{HERE}:tasks",
        rewards=[f"{HERE}:worth"],
        max_steps=1,
        max_completion_length=3,
        save_every=1,
    )
    trainer = Learner(system=Reader(["solver"]), args=RunConfig(**{**settings, **changes}))
    trainer.found = found
    return trainer.train()


def evaluated(folder: Path, *more: str) -> dict[str, Any]:
    """What `marlora eval` says of the run's checkpoint."""
    out = folder / "eval.json"
    own = ("--engine", "transformers", "--trust_checkpoint", "--system", f"{HERE}:Reader")
    main(["eval", str(folder / "checkpoints" / "step-000001"), *own, "--json", str(out), *more])
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def accuracies(result: Mapping[str, Any]) -> dict[str, float]:
    [measured] = result["sets"].values()
    return {name: row["accuracy"] for name, row in measured["contestants"].items()}


def test_the_trained_team_has_what_was_found_and_the_base_team_what_the_run_began_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """77 and 66 solve the tasks from 7 on: 3 of 10. 2 and 1 solve those from 2 on: 8."""
    summary = learnt(tmp_path / "run", model, {"number": "2", "solver.prompt": "Say 1"})
    assert summary["eval"]["before"]["accuracy"] == 3 / 10
    assert summary["eval"]["after"]["accuracy"] == 8 / 10
    result = evaluated(tmp_path / "run")
    assert result["eval"] == summary["eval"], "to the last digit"
    assert accuracies(result) == {"base team": 3 / 10, "trained team": 8 / 10}
    assert result["eval"]["paired"]["difference"] == pytest.approx(5 / 10)
    assert "is the base team" not in capsys.readouterr().err


def test_no_rung_below_has_what_was_found(model: Path, tmp_path: Path) -> None:
    """Without prompts the second digit is 0, and the first is the 7 of the start: 3 of 10. With the
    2 that was found, and with the prompt of the start, it would be 8 and 3."""
    found = {"number": "2", "solver.prompt": "Say 1"}
    learnt(tmp_path / "run", model, found, values={"number": "7", "solver.prompt": "Say 9"})
    rungs = accuracies(evaluated(tmp_path / "run", "--ladder"))
    del rungs["single agent"]  # says what the model says
    assert rungs == {"team without prompts": 3 / 10, "base team": 1 / 10, "trained team": 8 / 10}


def test_where_nothing_was_found_there_is_no_trained_team(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = learnt(tmp_path / "run", model, {})
    result = evaluated(tmp_path / "run")
    assert accuracies(result) == {"base team": 3 / 10}
    assert result["eval"]["before"] == result["eval"]["after"] == summary["eval"]["after"]
    assert "no value was learnt: it is the base team" in capsys.readouterr().err
