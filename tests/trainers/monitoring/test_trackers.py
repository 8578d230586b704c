"""`report_to`: names, what is logged, and TensorBoard's files as a run leaves them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from marlora.agents.types import SettingError
from marlora.trainers import config as settings
from marlora.trainers.config import TRACKERS, RunSettings
from marlora.trainers.monitoring.trackers import Trackers, numbers
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers import small_run


def test_names_are_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TRACKERS) <= {str(name) for name in LOGGER_TYPE_TO_CLASS}
    RunSettings(report_to=["tensorboard"])
    with pytest.raises(SettingError, match="did you mean 'tensorboard'"):
        RunSettings(report_to=["tensorbord"])
    with pytest.raises(SettingError, match="named twice"):
        RunSettings(report_to=["tensorboard", "tensorboard"])
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'marlora\[wandb\]'"):
        small_run.config("x", "y", report_to=["wandb"])


def test_every_number_is_logged_under_its_path() -> None:
    row = {
        "step": 3,
        "reward": 0.5,
        "policies": {"a": {"loss": 1, "applied": True, "problem": "", "kl": math.nan}},
        "none": None,
    }
    assert dict(numbers(row)) == {"reward": 0.5, "policies/a/loss": 1.0}


class Kept:
    """What Accelerate calls a tracker, in memory."""

    requires_logging_directory = False
    made: list[Kept] = []

    def __init__(self, project: str) -> None:
        self.project, self.told = project, list[Any]()
        Kept.made.append(self)

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_is_opened_told_and_closed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Kept)
    made = Trackers([name], tmp_path, {"seed": 0, "system": {"class": "x"}, "rewards": ["a"]})
    made.log({"reward": 1.0}, 2)
    made.close()
    start, configuration, *logged = Kept.made[-1].told
    assert start == "start" and Kept.made[-1].project == "marlora"
    told = {key: value for key, value in configuration.items() if not key.startswith("help/")}
    assert told == {"seed": 0, "system/class": "x", "rewards": "['a']"}
    *help, reward, finish = logged
    assert reward == (2, {"reward": 1.0}) and finish == "finish"
    clipped = "share of trained tokens whose ratio was clipped; lower is better"
    if name == "tensorboard":
        ((step, texts),) = help
        assert step == 0 and f"| `policies/*/clipped` | clipped | {clipped} |" in texts["metrics"]
    else:
        assert help == [] and configuration["help/policies/NAME/clipped"] == clipped


def test_a_run_fills_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = small_run.trainer(
        tmp_path / "run",
        tiny_random_model(tmp_path / "model"),
        max_steps=2,
        report_to=["tensorboard"],
    )
    trainer.train()
    found = EventAccumulator(str(tmp_path / "run" / "tracking" / "marlora"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert "metrics/text_summary" in found.Tags()["tensors"], "help, in the tab of texts"
    assert {
        "reward",
        "policies/first/loss",
        "policies/last/entropy",
        "eval/before",
        "eval/after",
        "seconds/train",
    } <= tags
    assert [event.step for event in found.Scalars("reward")] == [1, 2]
