"""A task before and after training, side by side, and kinds of task by how they moved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.episode_index import EpisodeIndex, task_kinds
from marlora.rollouts.report.learning.before_after import (
    changes,
    examples,
    ids_to_show,
    kinds_table,
    side_by_side,
)
from marlora.rollouts.report.run_data import RunData
from marlora.rollouts.types import Episode

EVIL = "</pre><script>alert(1)</script>"
KEYS = {"before": "a" * 16, "after": "b" * 16}


def evaluated(label: str, name: str, level: str, value: float) -> Episode:
    group = f"eval-{KEYS[label]}/{name}"
    said = f"{EVIL} {label}"
    turn = Turn(0, "solver", (Message("user", "?"),), text=said)
    task = Task(name, f"task {name}", "7", source="sums", split="eval", meta={"level": level})
    return Episode(
        f"{group}/0",
        group,
        task,
        kind="eval",
        split="eval",
        turns=(turn,),
        output=said,
        rewards=(Reward("exact", value),),
    )


# by task: its level, and what it earned before and after
MOVES = {
    "t0": ("easy", 1.0, 1.0),
    "t1": ("easy", 1.0, 0.0),
    "t2": ("hard", 0.0, 1.0),
    "t3": ("hard", 0.0, 1.0),
    "t4": ("hard", 0.0, 0.0),
}


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rewards": ["exact"]}))
    entries = {}
    with Store(tmp_path / "episodes", fsync=False) as store:
        for number, label in enumerate(KEYS):
            for name, (level, *values) in MOVES.items():
                store.append(evaluated(label, name, level, values[number]))
            entry = {"kind": "eval", "key": KEYS[label], "step": number, "tasks": list(MOVES)}
            entries[label] = {**entry, "n": 1}
    (tmp_path / "evaluations.json").write_text(json.dumps(entries))
    return RunData.read(tmp_path)


def test_examples_are_of_each_way_that_a_task_can_go(run: RunData) -> None:
    assert [change.gain for change in changes(run)] == [0.0, -1.0, 1.0, 1.0, 0.0]
    found = [(change.what, change.after.task) for change in examples(run)]
    assert found == [("training corrected", "t2"), ("training broke", "t1"), ("still fails", "t4")]
    assert len(ids_to_show(run)) == 6


def test_both_sides_are_shown_and_what_was_said_is_escaped(run: RunData) -> None:
    index = EpisodeIndex()
    index.add(run.folder, "run", run.episodes, 1, ids_to_show(run))
    assert ids_to_show(run) <= {name.removeprefix("0:") for name in index.episodes}
    page = side_by_side(run, 0, index)
    assert page.count("<details") == 3 and page.count("<details open") == 1
    heads = re.findall(r"<h4>(before|after) <small>(reward \d)", page)
    assert heads[:2] == [("before", "reward 0"), ("after", "reward 1")]
    assert page.count("&lt;script&gt;") == 6 and "<script" not in page
    assert "<h4>output</h4>" not in page, "the last turn is the output"


def test_an_episode_that_the_page_does_not_hold_is_left_out(run: RunData) -> None:
    assert side_by_side(run, 0, EpisodeIndex()) == ""


def test_kinds_of_task_by_hand(run: RunData) -> None:
    page = kinds_table(run)
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    cells = [re.sub(r" <small>.*?</small>", "", row).split("</td><td>") for row in rows]
    assert cells == [
        ["level", "hard", "3", "0.000", "0.667", "+0.667", "2", "0"],
        ["level", "easy", "2", "1.000", "0.500", "-0.500", "0", "1"],
    ], "all tasks have one source, which makes no kinds"


def test_kinds_are_made_of_short_values() -> None:
    meta = json.dumps({"level": 3, "solution": "x" * 41, "share": 0.5, "tags": ["a"]})
    assert task_kinds({"source": "sums", "meta": meta}) == {"source": "sums", "level": "3"}
    assert task_kinds({"source": "", "meta": "{}"}) == {}
