"""Two processes train the designer that one trains, and keep the workflows that one keeps: rank 0
plays, both decide and update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainers.autoflow_run import trainer
from tests.trainers.forks import two_ranks
from tests.trainers.reading import rows

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "step-000003" / "adapters" / "designer"
    return load_file(last / "adapter_model.safetensors")


def test_two_ranks_learn_what_one_learns(tmp_path: Path, model: Path) -> None:
    done = two_ranks("tests.trainers.autoflow_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    one = trainer(tmp_path / "one", model)
    one.train()
    found = [
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    ]
    assert found[0] == found[1]
    assert found[0]["values"] == one.run.values and one.run.values["workflow"] != one.example
    assert found[0]["search"] == json.loads(json.dumps(one.search.state_dict()))
    for mine, alone in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert mine["autoflow"] == alone["autoflow"]
        assert mine["policies"]["designer"]["tokens"] == alone["policies"]["designer"]["tokens"] > 0
    left, right = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) <= 1e-5
