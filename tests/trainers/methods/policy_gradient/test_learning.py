"""GRPO on the tiny model with the settings of recipes/grpo_team.yaml: it learns, each adapter does
its share, and nothing else does.

Measured, 20 steps, seed 0, held-out greedy accuracy on 200 tasks: base .34, only `first` .60, only
`last` .55, both 1.0, swapped .39.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from tests.repository import ROOT

pytestmark = pytest.mark.timeout(1800)
torch.set_num_threads(1)


def trainer(folder: Path, **changes: Any) -> GRPOTrainer:
    settings = yaml.safe_load((ROOT / "recipes" / "grpo_team.yaml").read_text())
    return GRPOTrainer(
        args=GRPOConfig(**{**settings, "output_dir": str(folder), "save_every": 1000, **changes})
    )


def swapped(trained: GRPOTrainer) -> float:
    """Held-out accuracy with each adapter under the other agent's name."""
    with trained.run as run:
        (publisher,) = run.sync.publishers.values()
        versions = {}
        for agent, other in (("first", "last"), ("last", "first")):
            earlier = run.sync.current[other]
            versions[agent] = f"{agent}-swapped-{earlier.rpartition('-')[2]}"
            shutil.copytree(publisher.root / earlier, publisher.root / versions[agent])
        result = run.evaluator.evaluate("swapped", run.state.with_versions(versions))
        assert result is not None
        return result.accuracy


def check_learning(folder: Path, **changes: Any) -> None:
    """The reward rises, held-out accuracy by at least .25; each adapter alone is worth .08;
    swapped, together they are worth no more than one alone."""
    trained = trainer(folder, **changes)
    summary = trained.train()
    before, after = summary["eval"]["before"]["accuracy"], summary["eval"]["after"]["accuracy"]
    alone = {name: found["accuracy"] for name, found in summary["adapters"].items()}
    crossed = swapped(trained)
    told = f"base {before}, alone {alone}, both {after}, swapped {crossed}"
    print(told)
    assert set(alone) == {"first", "last"}
    assert after - before >= 0.25 and summary["eval"]["paired"]["ci95"][0] > 0.15, told
    assert min(alone.values()) - before >= 0.08 and max(alone.values()) < after, told
    assert crossed <= after - 0.2 and crossed <= max(alone.values()) + 0.05, told
    rewards = [
        json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05, rewards
    proof = summary["live_proof"]
    assert (
        proof["failed"] == 0
        and proof["passed"] == 2 * summary["steps"]
        and proof["max_residual"] < 0.001
    )
    assert all(
        policy["sha256_before"] != policy["sha256_after"] for policy in summary["policies"].values()
    )


def test_a_team_learns(tmp_path: Path):
    check_learning(tmp_path / "run", max_steps=20)


def test_with_learning_rate_0_nothing_changes(tmp_path: Path):
    """Not one bit of an adapter, not one held-out answer; the proof says that there was nothing to
    prove."""
    control = trainer(tmp_path / "run", max_steps=3, learning_rate=0.0, num_eval_tasks=100)
    summary = control.train()
    assert all(
        policy["sha256_before"] == policy["sha256_after"] for policy in summary["policies"].values()
    )
    assert summary["eval"]["after"] == summary["eval"]["before"]
    assert summary["eval"]["paired"] == {
        "difference": 0.0,
        "ci95": [0.0, 0.0],
        "gained": 0,
        "lost": 0,
    }
    assert summary["tokens"]["trained"] > 500 and summary["adapters"] == {}
    proof = summary["live_proof"]
    assert (proof["checks"], proof["untrained"], proof["passed"], proof["failed"]) == (2, 2, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_team_learns_with_other_seeds(tmp_path: Path, seed: int):
    check_learning(tmp_path / "run", max_steps=20, seed=seed)


@pytest.mark.slow
def test_learning_from_success_alone(tmp_path: Path):
    """Rejection sampling as a credit rule: the turns of correct episodes count 1, all others are
    dropped."""
    check_learning(tmp_path / "run", max_steps=20, credit="success")
