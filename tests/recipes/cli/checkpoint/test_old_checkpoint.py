"""A checkpoint written by marlora 0.1, before its modules moved: still trusted, still the same
accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from marlora.recipes.cli.main import main
from tests.repository import ROOT

# 30 steps of recipes/grpo_team.py on a two-layer model of 67,000 weights; 0.1 reported 27 and 40 of
# 60 held-out tasks. `system.json` names marlora.agents.chain:Chain and
# marlora.trainers.tiny:tiny_tasks, which are elsewhere today.
DATA = ROOT / "tests" / "data" / "checkpoint-0.1"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    copy = tmp_path / "run" / "checkpoints" / "step-000030"
    shutil.copytree(DATA / "step-000030", copy)
    return copy


def test_its_accuracy_is_what_0_1_reported(checkpoint: Path, tmp_path: Path) -> None:
    result = tmp_path / "eval.json"
    arguments = ["--model", str(DATA / "base"), "--engine", "transformers", "--json", str(result)]
    with pytest.warns(FutureWarning, match=r"marlora\.agents\.patterns\.chain:Chain"):
        main(["eval", str(checkpoint), *arguments])
    accuracies = json.loads(result.read_text())["eval"]
    assert accuracies["before"]["accuracy"] == 27 / 60
    assert accuracies["after"]["accuracy"] == 40 / 60
    assert (accuracies["paired"]["gained"], accuracies["paired"]["lost"]) == (16, 3)


def test_an_old_path_outside_the_table_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    system = json.loads((checkpoint / "system.json").read_text())
    system["system"]["class"] = "marlora.agents.chain:json"
    (checkpoint / "system.json").write_text(json.dumps(system))
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(checkpoint), "--model", str(DATA / "base"), "--engine", "transformers"])
    assert stopped.value.code == 2
