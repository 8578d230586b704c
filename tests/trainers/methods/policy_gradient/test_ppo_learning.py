"""Plain PPO on the tiny chain, with the settings of its recipe: it learns, and so do its
critics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from marlora.trainers.methods.policy_gradient.ppo import PPOConfig, PPOTrainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]


def test_policies_and_critics_learn(tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "recipes/ppo_team.yaml").read_text())
    settings |= {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 10,
        "save_every": 100,
        "ablate_adapters": False,
        "num_eval_tasks": 100,
    }
    summary = PPOTrainer(args=PPOConfig(**settings)).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = json.dumps({"eval": summary["eval"], "rewards": [row["reward"] for row in rows]})
    assert summary["eval"]["paired"]["ci95"][0] > 0.2, told
    for name in ("first", "last"):
        losses = [row["critics"][name]["value_loss"] for row in rows]
        assert losses[-1] < 0.6 * losses[0], f"{name}: {losses}"
