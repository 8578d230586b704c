"""Two processes learn the edges that one learns, to the last bit: rank 0 plays, both update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from tests.trainers.forks import two_ranks
from tests.trainers.reading import rows
from tests.trainers.swarms import trainer

pytestmark = pytest.mark.process


def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    done = two_ranks("tests.trainers.swarm_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = trainer(tmp_path / "one", model, max_steps=3, tasks_per_step=6, num_eval_tasks=4)
    summary = one.train()
    expected = {"table": one.table.state_dict(), "values": one.run.values}
    for rank in (0, 1):
        found = json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        assert found == json.loads(json.dumps(expected)), rank
    assert one.table.logits["t1->output"]["on"] != 0
    mine = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert mine["eval"] == summary["eval"]
    for two, alone in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert two["edges"] == alone["edges"] and two["state"] == alone["state"]
    played = [{e.id: e.decisions for e in Store(tmp_path / n / "episodes")} for n in ("one", "two")]
    assert played[0] == played[1] and len(played[0]) == 3 * 6 + 2 * 4
