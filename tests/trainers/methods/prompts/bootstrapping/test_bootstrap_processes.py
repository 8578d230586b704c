"""Bootstrapping in processes of its own: killed in the middle of a candidate, and on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.repository import ROOT
from tests.trainers.forks import two_ranks
from tests.trainers.methods.prompts.bootstrapping.finetune_run import two_steps
from tests.trainers.methods.prompts.bootstrapping.rules_run import trainer

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]
PROGRAM = "tests.trainers.methods.prompts.bootstrapping.rules_run"


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """How a run ends that nothing cut off: values and archive, ledger."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    ended = {"values": made.run.values, "archive": made.search.state_dict()}
    return json.dumps(ended), json.dumps(made.run.ledger.to_json())


@pytest.mark.parametrize("call", [pytest.param(150, marks=pytest.mark.slow), 290])
def test_a_killed_run_ends_as_the_whole_one(
    call: int, whole: tuple[str, str], model: Path, tmp_path: Path
) -> None:
    """In bootstrapping, and inside the evaluation of a candidate."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", PROGRAM, str(folder), str(model), str(call)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]
    again = trainer(folder, model, resume=True)
    again.train()
    ended = {"values": again.run.values, "archive": again.search.state_dict()}
    assert json.dumps(ended) == whole[0] and json.dumps(again.run.ledger.to_json()) == whole[1]


def test_two_ranks_find_what_one_finds(whole: tuple[str, str], model: Path, tmp_path: Path) -> None:
    done = two_ranks(PROGRAM, tmp_path / "two", model)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == json.loads(whole[0])


@pytest.mark.slow
def test_two_ranks_imitate_as_one(model: Path, tmp_path: Path) -> None:
    done = two_ranks(
        "tests.trainers.methods.prompts.bootstrapping.finetune_run", tmp_path / "two", model
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"two.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["values"] == {"first.demos": [], "last.demos": []}
    two_steps(tmp_path / "one", model)

    def tensors(side: str, policy: str) -> torch.Tensor:
        folder = tmp_path / side / "checkpoints/step-000002/adapters" / policy
        loaded = load_file(folder / "adapter_model.safetensors")
        return torch.cat([loaded[key].flatten() for key in sorted(loaded)]).double()

    for policy in ("first", "last"):
        assert (tensors("one", policy) - tensors("two", policy)).abs().max() <= 1e-5
