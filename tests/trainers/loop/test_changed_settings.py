"""A run that is resumed under other settings: nothing that was played or scored under the old ones is
taken for the new ones' own, and people are told what has changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError, Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.changed_settings import changed, describe
from marlora.trainers.trainer import Trainer
from tests.trainers.loop.test_state import Cut, said

pytestmark = pytest.mark.usefixtures("one_thread")


def value(task: Task, episode: Episode) -> float:
    return float(episode.output or 0) + float(task.answer)


def doubled(task: Task, episode: Episode) -> float:
    return 2 * float(episode.output or 0)


class Recorder(Trainer[RunConfig]):
    """Learns nothing; dies in step 2 if it is told to."""

    Config = RunConfig
    cut = False
    seen: list[Episode]

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        self.seen = list(episodes)
        if self.cut and step == 2:
            raise Cut
        return {}


def recorder(folder: Path, model: Path, *, answer: str = "0", **changes: Any) -> Recorder:
    tasks = [Task(f"t{n}", f"question {n}", answer, split="train") for n in range(4)]
    held_out = [Task(f"e{n}", f"exam {n}", answer, split="eval") for n in range(2)]
    rewards = changes.pop("scores", [value])
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={"solver": {"trainable": False}},
        agents={"solver": {"prompt": "say 1"}},
        max_steps=2,
        tasks_per_step=2,
        num_generations=2,
        max_completion_length=6,
        save_every=1,
    )
    return Recorder(
        system=Chain(["solver"]),
        tasks=tasks,
        eval_tasks=held_out,
        rewards=rewards,
        args=RunConfig(**{**settings, **changes}),
        engine=ScriptedEngine(said),
    )


def trained_on(folder: Path) -> list[str]:
    return [e.id for e in Store(folder / "episodes").read(kind="train")]


@pytest.mark.parametrize(
    ("change", "worth"),
    [
        ({"agents": {"solver": {"prompt": "say 3"}}}, 3.0),
        ({"scores": [doubled]}, 2.0),
        ({"answer": "5"}, 6.0),
        ({"temperature": 0.5}, 1.0),
        ({"max_completion_length": 3}, 1.0),
    ],
    ids=["prompt", "reward", "answer", "temperature", "length"],
)
def test_what_was_played_under_other_settings_is_played_again(
    change: dict[str, Any], worth: float, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = recorder(folder, model)
    first.cut = True
    with pytest.raises(Cut):
        first.train()
    before = trained_on(folder)
    assert len(before) == 8
    again = recorder(folder, model, resume=True, **change)
    summary = again.train()
    played = trained_on(folder)[len(before) :]
    assert [e.id for e in again.seen] == played and len(played) == 4
    assert all(sum(r.value for r in e.rewards) == worth for e in again.seen)
    assert summary["eval"]["before"]["accuracy"] == worth == summary["eval"]["after"]["accuracy"]
    once_more = recorder(folder, model, resume=True, max_steps=3, **change)
    once_more.cut = False
    once_more.train()
    assert len(trained_on(folder)) == 8 + 4 + 4


def test_settings_that_did_not_change_play_nothing_again(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = recorder(folder, model)
    first.cut = True
    with pytest.raises(Cut):
        first.train()
    before = trained_on(folder)
    recorder(folder, model, resume=True, learning_rate=0.5).train()
    assert trained_on(folder) == before


def test_changes_are_listed_with_old_and_new_values(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    recorder(folder, model, max_steps=1).train()
    capsys.readouterr()
    recorder(folder, model, resume=True, agents={"solver": {"prompt": "say 2"}}).train()
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("resume: ")]
    assert "resume: agents.solver.prompt: 'say 1' -> 'say 2'" in lines
    assert "resume: max_steps: 1 -> 2" in lines and len(lines) == 2


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"num_val_tasks": 1}, {"values": {"solver.prompt": "say 2"}}]
)
def test_what_may_not_change_is_refused_and_nothing_is_lost(
    change: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recorder(folder, model, max_steps=1).train()
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    (name,) = change
    with pytest.raises(SettingError, match=name):
        recorder(folder, model, resume=True, **change).train()
    assert (folder / "config.yaml").read_text(encoding="utf-8") == config
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 1


def test_what_changed_by_path() -> None:
    old = {"a": 1, "m": {"x": {"p": 1}, "y": 2}, "gone": 3}
    new = {"a": 2, "m": {"x": {"p": 5}, "y": 2, "z": 0}, "fresh": 4}
    assert {k: v for k, v in changed(old, new).items() if k != "m.z"} == {
        "a": (1, 2),
        "m.x.p": (1, 5),
    }
    assert describe({"policies": {"p": {"url": "a"}}}, {"policies": {"p": {"url": "b"}}}) == [
        "policies.p.url: (not shown, because it may be a key) -> (not shown, because it may be a key)"
    ]
    assert describe({"m": {}}, {"m": {"z": 0}}) == ["m.z: (none) -> 0"]
    assert describe({"resume": False}, {"resume": True}) == []
