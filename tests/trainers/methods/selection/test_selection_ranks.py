"""Two processes select what one selects, and both know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers.forks import two_ranks
from tests.trainers.selection_program import select

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]


def test_two_ranks_select_what_one_selects(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    done = two_ranks("tests.trainers.selection_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = json.loads(json.dumps(select(tmp_path / "one", model)))
    two = [json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0] == two[1] == one
    assert one["values"][0] == {"locate.policy": "A", "solve.policy": "B"}
    for name in ("llmselector", "dylan"):
        mine, theirs = (
            json.loads((tmp_path / count / name / "summary.json").read_text())
            for count in ("one", "two")
        )
        for key in ("steps", "done", "eval", "budget", "state"):
            assert mine[key] == theirs[key], (name, key)
