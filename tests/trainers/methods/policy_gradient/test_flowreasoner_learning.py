"""FlowReasoner on the tiny designer: GRPO raises what trajectories earn above what the warm-up
left.

What was measured stands in recipes/RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.trainers.methods.policy_gradient.flowreasoner import (
    FlowReasonerConfig,
    FlowReasonerTrainer,
)
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch.set_num_threads(1)


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    """The summary."""
    settings = yaml.safe_load((ROOT / "recipes" / "flowreasoner.yaml").read_text())
    args = FlowReasonerConfig(
        **{**settings, "output_dir": str(folder), "ablate_adapters": False, **changes}
    )
    summary = FlowReasonerTrainer(args=args).train()
    print(json.dumps({"stages": summary["stages"], "eval": summary["eval"]}))
    return summary


def test_what_runs_earn_teaches_more_than_the_warm_up(tmp_path: Path) -> None:
    stages = run(tmp_path / "run")["stages"]
    assert stages["rl"]["reward"] >= stages["sft"]["reward"] + 0.15, stages


def test_without_a_learning_rate_the_stages_are_one(tmp_path: Path) -> None:
    """The control: the same trajectories, and no step."""
    summary = run(tmp_path / "run", learning_rate=0.0, sft_learning_rate=0.0, max_steps=2)
    stages = summary["stages"]
    assert all(
        policy["sha256_before"] == policy["sha256_after"] for policy in summary["policies"].values()
    )
    assert stages["rl"]["reward"] == pytest.approx(stages["sft"]["reward"], abs=0.1), stages
