"""What each agent was credited with, by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.learning.agent_credit import agent_credit, credit_table, mean_advantage
from marlora.rollouts.report.run_data import RunData
from marlora.rollouts.types import Episode


def played(step: int, value: float) -> Episode:
    label = f"train-{step:06d}/t"
    told = (Message("user", "?"),)
    turns = (Turn(0, "solver", told, text="7"), Turn(1, "critic", told, text="fine"))
    rewards = (Reward("exact", value), Reward("kind", value, agent="critic"))
    return Episode(f"{label}/0", label, Task("t", "?"), step=step, turns=turns, rewards=rewards)


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    """Both agents speak one policy."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rewards": ["exact"]}))
    advantages = [(1, 0, 1.0), (1, 1, -0.5), (2, 0, [0.5, None, 1.0]), (2, 1, None)]
    lines = [
        {"step": s, "policy": "shared", "episode": f"train-{s:06d}/t/0", "turn": t, "ids": 0}
        | {"advantage": advantage, "ratio": []}
        for s, t, advantage in advantages
    ]
    lines.append({**lines[0], "episode": "gone", "advantage": 2.0})
    (tmp_path / "learned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Store(tmp_path / "episodes", fsync=False) as store:
        store.extend([played(step, value) for step, value in ((1, 0.25), (2, 0.5), (3, 1.0))])
    return RunData.read(tmp_path)


def test_advantages_go_to_the_agent_that_spoke(run: RunData) -> None:
    found = agent_credit(run)
    assert {n: (c.turns, c.towards, c.size) for n, c in found.items()} == {
        "solver": (2, 2, 1.75),
        "critic": (1, 0, 0.5),
        "shared": (1, 1, 2.0),  # of an episode that is not in the store
    }
    assert dict(found["critic"].own) == {1: [0.25], 2: [0.5], 3: [1.0]} and not found["solver"].own


def test_the_table_has_the_columns_that_say_something(run: RunData) -> None:
    page = credit_table(run)
    assert "its adapter alone" not in page
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    critic = next(row for row in rows if "critic" in row).split("</td><td>")[1:]
    assert critic == ["1", "0 %", "0.5", "0.25", "1"]


def test_a_run_without_credit_has_no_table(run: RunData) -> None:
    (run.folder / "learned.jsonl").unlink()
    run.episodes = []
    assert credit_table(run) == ""


def test_an_advantage_per_token_is_averaged() -> None:
    assert mean_advantage([1.0, None, 0.0]) == 0.5 and mean_advantage(-2) == -2.0
    assert mean_advantage(None) is None and mean_advantage([]) is None
