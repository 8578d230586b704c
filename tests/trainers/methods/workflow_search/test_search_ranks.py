"""Two processes search what one searches, and both know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers.forks import two_ranks
from tests.trainers.search_program import searched

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]


def test_two_ranks_search_what_one_searches(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    done = two_ranks("tests.trainers.search_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = json.loads(json.dumps(searched(tmp_path / "one", model)))
    two = [
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    ]
    assert two[0] == two[1] == one
    for name in ("aflow", "adas", "debflow"):
        mine, theirs = (
            json.loads((tmp_path / count / name / "summary.json").read_text(encoding="utf-8"))
            for count in ("one", "two")
        )
        for key in ("steps", "done", "eval", "budget", "state", "programs"):
            assert mine[key] == theirs[key], (name, key)
