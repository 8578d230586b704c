"""W4S on the tiny designer: after one fit it writes better programs, and only where the weights
follow the rewards.

What was measured stands in recipes/RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.trainers.methods.imitation.w4s import W4SConfig, W4STrainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch.set_num_threads(1)


def run(folder: Path, **changes: Any) -> tuple[float, float]:
    """The mean accuracy of the candidates of first turns, before the fit and after it."""
    settings = yaml.safe_load((ROOT / "recipes" / "w4s.yaml").read_text(encoding="utf-8"))
    args = {**settings, "output_dir": str(folder), "num_eval_tasks": 8, **changes}
    made = W4STrainer(args=W4SConfig(**args))
    summary = made.train()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before, after = (json.loads(line)["w4s"] for line in lines)
    print(json.dumps([before, after]))
    assert before["fitted"] and not after["fitted"]
    # the executor is the base, which no fit touches; the designer's adapter alone moved
    (policy,) = summary["policies"]
    assert policy == "designer"
    return before["accuracy_by_turn"][0], after["accuracy_by_turn"][0]


def test_a_fit_weighted_by_rewards_raises_what_is_written(tmp_path: Path) -> None:
    before, after = run(tmp_path / "run")
    assert after >= before + 0.2, (before, after)


def test_a_fit_with_equal_weights_raises_nothing(tmp_path: Path) -> None:
    """The control: the same candidates, imitated as they are."""
    before, after = run(tmp_path / "run", weights="constant")
    assert after == pytest.approx(before, abs=0.15), (before, after)
