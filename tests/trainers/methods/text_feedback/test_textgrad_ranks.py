"""Two processes come to the prompts that one comes to: rank 0 plays and asks, both decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from tests.trainers.feedback_run import trainer
from tests.trainers.forks import two_ranks
from tests.trainers.loop.test_state import facts

pytestmark = pytest.mark.process


def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    done = two_ranks("tests.trainers.feedback_run", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = trainer(tmp_path / "one", model)
    one.train()
    assert "means" in one.run.values["solver.prompt"]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        assert found["values"] == one.run.values, rank
    assert facts(tmp_path / "two") == facts(tmp_path / "one")
    asked = [e for e in Store(tmp_path / "two" / "episodes") if e.kind == "aside"]
    assert len(asked) == 4 * 7, "each question once, not once per rank"
