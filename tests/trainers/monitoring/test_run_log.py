"""The log of a run alone: counters that survive a resume, dumps, and when a run has to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.trainers.config import RunConfig
from marlora.trainers.errors import RunError
from marlora.trainers.monitoring.run_log import RunLog
from marlora.trainers.update.optimizer_step import UpdateResult


def result(applied: bool = True) -> UpdateResult:
    problem = "" if applied else "loss is nan"
    return UpdateResult({}, 0.0, 5, 1, 1e-4, applied=applied, problem=problem)


def log(folder: Path) -> RunLog:
    made = RunLog(RunConfig(output_dir=str(folder)))
    made.main = True
    return made


def test_its_state_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = log(tmp_path)
    first.spend("train", 2.0)
    first.trained(7)
    first.updated(3, {"a": result(False)}, ())
    first.finished(3)
    first.raise_alarms({"a": {"tokens": 1, "first_mismatch_kl": 1e-6}})
    state = json.loads(json.dumps(first.state_dict()))
    second = log(tmp_path)
    second.load_state_dict(state)
    assert second.state_dict() | {"seconds": {}} == state | {"seconds": {}}
    assert (second.step, second.aborted, second.tokens["trained"]) == (3, 1, 7)
    assert second.seconds["train"] == 2.0 and second.alarms.noise == {"a": 1e-6}


def test_the_third_step_in_a_row_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    made = log(tmp_path)
    for step in (1, 2):
        made.updated(step, {"a": result(False)}, ())
        made.updated(step, {"a": result(False)}, ())  # two updates of a step count once
        made.finished(step)
    made.finished(3)
    assert made.aborted == 0, "a step without trouble in between"
    for step in (4, 5):
        made.updated(step, {"a": result(False)}, ())
        made.finished(step)
    with pytest.raises(RunError, match="three steps in a row were not finite"):
        made.updated(6, {"a": result(False)}, ())
    dump = json.loads((tmp_path / "dumps/step-000006.json").read_text())
    assert dump == {"problems": {"a": "loss is nan"}, "samples": []}


def test_other_ranks_count_and_write_nothing(tmp_path: Path) -> None:
    other = log(tmp_path)
    other.main = False
    other.updated(1, {"a": result(False)}, ())
    assert other.aborted == 1 and not any(tmp_path.iterdir())
