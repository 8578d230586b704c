"""Preferences on two ranks: turns are scored and learnt from in shares, and every rank ends with
the adapters that one process gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.trainers.forks import two_ranks
from tests.trainers.preference_program import learn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def tensors(folder: Path, policy: str) -> torch.Tensor:
    found = load_file(
        folder / "checkpoints/step-000002/adapters" / policy / "adapter_model.safetensors"
    )
    return torch.cat([found[key].flatten() for key in sorted(found)]).double()


def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny_random_model(tmp_path / "model")
    done = two_ranks("tests.trainers.preference_program", tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    learn(tmp_path / "one", model)
    for mode in ("joint", "sampling"):
        rows = [
            [
                json.loads(line)["preference"]
                for line in (tmp_path / side / mode / "metrics.jsonl").read_text().splitlines()
            ]
            for side in ("one", "two")
        ]
        assert [row["pairs"] for row in rows[0]] == [row["pairs"] for row in rows[1]] and rows[0][
            0
        ]["pairs"] > 0
        assert [row["loss"] for row in rows[0]] == pytest.approx(
            [row["loss"] for row in rows[1]], abs=1e-5
        )
        for policy in ("first", "last"):
            assert (
                tensors(tmp_path / "two" / mode, policy) - tensors(tmp_path / "one" / mode, policy)
            ).abs().max() <= 1e-5
