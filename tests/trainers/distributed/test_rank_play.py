"""Two ranks play what one plays, into one store; one that is killed is named, and the run goes on
from where it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.episodes.store import Store
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers.forks import two_ranks
from tests.trainers.play_program import trainer

pytestmark = [pytest.mark.process, pytest.mark.slow]


def start(folder: Path, model: Path, fault: str) -> subprocess.CompletedProcess[str]:
    return two_ranks("tests.trainers.play_program", folder, model, fault)


def played(folder: Path) -> list[list[str]]:
    """By rank, what it has played."""
    paths = [Path(f"{folder}.rank{rank}.json") for rank in (0, 1)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def lines(folder: Path) -> dict[str, Any]:
    """The store's lines by id, without their seconds."""
    found = {}
    for row in Store(folder / "episodes").lines():
        row["usage"] = [{**usage, "seconds": 0.0} for usage in row["usage"]]
        found[row["id"]] = row
    return found


def test_two_ranks_play_what_one_plays(tmp_path: Path) -> None:
    """In the first of two launches rank 1 is killed in the middle of a step; the second goes on."""
    model, one, two = tiny_random_model(tmp_path / "model"), tmp_path / "one", tmp_path / "two"
    expected = trainer(one, model).train()
    killed = start(two, model, "kill")
    assert killed.returncode != 0
    assert "rank 1 is gone" in killed.stderr and "--resume" in killed.stderr, killed.stderr[-4000:]
    before = lines(two)
    assert 0 < len(before) < len(lines(one)), "it was killed while it played"
    done = start(two, model, "resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert lines(two) == lines(one)
    shares = played(two)
    assert sorted([*shares[0], *shares[1]]) == sorted(lines(two).keys() - before.keys())
    assert min(map(len, shares)) > len(before) / 4, "both have played a share"
    summary = json.loads((two / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["after"] == expected["eval"]["after"]
    assert summary["tokens"] == expected["tokens"]
    for kind, agents in expected["ledger"].items():
        for agent, row in agents.items():
            own = summary["ledger"][kind][agent]
            assert own["sampled_tokens"] == row["sampled_tokens"]
