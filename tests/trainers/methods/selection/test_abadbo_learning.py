"""A-BAD-BO on the tiny model, where one agent's own data are bad for the team: `first` is shown sums
that are one too large, `last` right ones. The control is the team that is trained to the least local
losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.methods.selection.abadbo import ABADBOConfig, ABADBOTrainer
from tests.repository import ROOT

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def lesson(task: Task) -> Episode:
    """What both agents are to imitate."""
    a, b, c = (int(task.meta[name]) for name in "abc")

    def turn(index: int, agent: str, asked: str, said: int) -> Turn:
        chat = (Message("system", agent), Message("user", asked))
        return Turn(index, agent, chat, text=str(said), source="written", policy=agent)

    turns = turn(0, "first", task.prompt, a + b + 1), turn(1, "last", f"{a + b}+{c}", a + b + c)
    reward = Reward("exact", 1.0)
    return Episode(f"e-{task.id}", f"g-{task.id}", task, turns=turns, output="", rewards=(reward,))


def test_an_agent_whose_own_data_mislead_is_hardly_trained(tmp_path: Path) -> None:
    with Store(tmp_path / "lessons") as store:
        store.extend([lesson(task) for task in tiny_tasks()[:64]])
    settings = ROOT / "recipes" / "abadbo.yaml"
    config: dict[str, Any] = yaml.safe_load(settings.read_text(encoding="utf-8"))
    config |= {
        "output_dir": str(tmp_path / "run"),
        "episodes": str(tmp_path / "lessons"),
        "select": "all",
        "num_eval_tasks": 60,
        "num_val_tasks": 40,
        "tasks_per_step": 64,
        "checkpoint_every": 2,
        "num_targets": 3,
        "teams_per_target": 2,
        "ablate_adapters": False,
    }
    summary = ABADBOTrainer(args=ABADBOConfig(**config)).train()
    start, full, *tried = summary["targets"]
    best = next(row for row in summary["targets"] if row["kept"])
    told = "\n".join(
        f"{row['name']} {row['achieved']} {row['score']} {row.get('predicted')}"
        for row in summary["targets"]
    )
    print(told, summary["eval"])
    assert full["score"] < start["score"] < best["score"], told
    assert best in tried and best["score"] > start["score"] + 0.1, told
    assert best["achieved"]["first"] > full["achieved"]["first"]
    assert best["achieved"]["last"] < start["achieved"]["last"]
    accuracy = {when: summary["eval"][when]["accuracy"] for when in ("before", "after")}
    assert accuracy["after"] > accuracy["before"] + 0.1
