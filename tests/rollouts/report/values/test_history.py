"""Values over time are read from the states that episodes played with, and from checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import StoreError
from marlora.rollouts.report.run_data import RunData
from marlora.rollouts.report.values.history import (
    ValueHistory,
    as_logits,
    as_text,
    is_choice,
    is_numeric,
    trials_of,
)
from tests.rollouts.report.learnt_values import MAPPING, PROMPTS, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def read(run: Path) -> ValueHistory:
    return ValueHistory.read(RunData.read(run))


def test_every_step_has_the_values_of_its_state(run: Path) -> None:
    history = read(run)
    assert [step for step, _ in history.points] == [0, 1, 2, 3]
    assert history.names == [
        "edges",
        "first.policy",
        "first.prompt",
        "second.policy",
        "temperature",
    ]
    assert history.of("temperature") == [(0, 0.5), (1, 0.6), (2, 0.7), (3, 0.8)]
    assert history.changes("first.policy") == [(0, MAPPING[0]), (3, MAPPING[2])]
    assert history.changes("second.policy") == [(0, "base")]


def test_a_value_that_was_not_set_at_the_start_is_the_agents_own(run: Path) -> None:
    assert read(run).changes("first.prompt") == [(0, PROMPTS[0]), (1, PROMPTS[1]), (3, PROMPTS[2])]


def test_a_state_nobody_played_with_is_that_of_its_checkpoint_or_unknown(run: Path) -> None:
    states = run / "episodes" / "values"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        (states / f"{row['state']}.json").unlink()
    assert [step for step, _ in read(run).points] == [0, 1, 3], "of step 2 nothing is kept"
    shutil.rmtree(run / "checkpoints")
    found = read(run)
    assert [step for step, _ in found.points] == [0, 1]
    assert found.points[0][1]["first.policy"] == "base", "of the first episode"


def test_trials_are_told_apart_by_the_values_they_had(run: Path) -> None:
    found = trials_of(RunData.read(run))
    assert [begin for begin, _ in found] == [f"trial-{step:016d}/" for step in (1, 2, 3)]
    assert [had["temperature"] for _, had in found] == [0.6, 0.7, 0.8]


def test_a_state_that_was_altered_is_refused(run: Path) -> None:
    key = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["state"]
    path = run / "episodes" / "values" / f"{key}.json"
    path.write_text(path.read_text().replace("step by step", "at once"))
    with pytest.raises(StoreError, match="holds another state"):
        read(run)


def test_what_a_value_looks_like() -> None:
    assert is_choice("solver.policy", ["base", None, "adds"]) and is_choice("team", [True])
    assert not is_choice("solver.prompt", ["Solve."]) and not is_choice("x", ["two words"])
    assert not is_choice("x", ["a" * 41]) and not is_choice("x", [None]) and not is_choice("x", [1])
    assert is_numeric([1, None, 0.5]) and not is_numeric([True]) and not is_numeric([None])
    assert as_logits({"a": {"on": 1, "off": 0.0}}) == {"a": {"on": 1, "off": 0.0}}
    assert as_logits({"on": 1.0, "off": 0.0}) == {"": {"on": 1.0, "off": 0.0}}
    for wrong in ({}, "a", {"a": {}}, {"a": {"b": "c"}}, {"a": 1, "b": "c"}, [1, 2]):
        assert as_logits(wrong) is None
    demos = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    assert as_text(demos) == "user: 2+2\nassistant: 4"
    assert as_text({"b": 1, "a": "ü"}) == '{\n "a": "ü",\n "b": 1\n}' and as_text(None) == ""
