"""Two processes learn the controller that one learns, to the last bit: rank 0 plays, both update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainers.forks import two_ranks
from tests.trainers.reading import rows
from tests.trainers.supernets import trainer

pytestmark = pytest.mark.process


def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    done = two_ranks("tests.trainers.supernet_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = trainer(tmp_path / "one", model, max_steps=3, tasks_per_step=2, num_eval_tasks=4)
    summary = one.train()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        assert found == {"sha256": one.controller.sha256(), "values": one.run.values}, rank
    mine = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert (mine["eval"], mine["supernet"]) == (summary["eval"], summary["supernet"])
    for two, alone in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert two["supernet"] == alone["supernet"] and two["state"] == alone["state"]
