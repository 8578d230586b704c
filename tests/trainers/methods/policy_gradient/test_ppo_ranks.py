"""Two processes train the policies and critics that one trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers.forks import two_ranks
from tests.trainers.ppo_program import learn
from tests.trainers.reading import rows

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("one_thread")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    last = folder / "checkpoints" / "step-000002"
    files = [path for path in last.rglob("*.safetensors") if path.stem in ("adapter_model", "head")]
    assert len(files) == 2 * (1 + 2)
    return {
        f"{path.parent}/{path.stem} {key}".removeprefix(str(last)): t
        for path in files
        for key, t in load_file(path).items()
    }


def test_two_ranks_train_what_one_trains(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    done = two_ranks("tests.trainers.ppo_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    learn(tmp_path / "one", model)
    hashes = [json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in (0, 1)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 4
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    for mine, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for part in ("policies", "critics"):
            for name in ("first", "last"):
                a, b = mine[part][name], theirs[part][name]
                assert a.keys() == b.keys() and a["tokens"] == b["tokens"] > 0
                for key in ("value", "value_loss", "explained_variance", "kl_reward", "grad_norm"):
                    assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
