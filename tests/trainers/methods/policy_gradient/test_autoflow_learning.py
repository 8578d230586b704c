"""AutoFlow on the tiny designer: what its workflows earn rises, and does not if another workflow's
reward is learnt from, or nothing is.

What was measured stands in recipes/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.types import Task
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.autoflow import AutoFlowConfig, AutoFlowTrainer
from marlora.trainers.methods.policy_gradient.workflow_designs import ScoredWorkflow
from tests.repository import ROOT
from tests.trainers.reading import rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
torch.set_num_threads(1)


class Shuffled(AutoFlowTrainer):
    """Every workflow gets the reward of another one of its step."""

    def _scored(self, designs: Sequence[Episode], tasks: Sequence[Task]) -> list[ScoredWorkflow]:
        scored = super()._scored(designs, tasks)
        rewards = [each.reward for each in scored]
        random.Random(self.run.step).shuffle(rewards)
        pairs = zip(scored, rewards, strict=True)
        return [dataclasses.replace(each, reward=reward) for each, reward in pairs]


def run(
    folder: Path, cls: type[AutoFlowTrainer] = AutoFlowTrainer, **changes: Any
) -> dict[str, Any]:
    """The summary, with `valid` and `reward` by step."""
    settings = yaml.safe_load((ROOT / "recipes" / "autoflow.yaml").read_text(encoding="utf-8"))
    args = AutoFlowConfig(**{**settings, "output_dir": str(folder), "overwrite": True, **changes})
    summary = cls(args=args).train()
    steps = [row["autoflow"] for row in rows(folder)]
    found = {name: [row[name] for row in steps] for name in ("valid", "reward")}
    print(json.dumps({"designs": summary["designs"], **found}))
    return {**summary, **found}


def test_the_designer_learns_what_is_valid_and_what_to_ask_for(tmp_path: Path) -> None:
    """Few steps, few workflows: the rise over the whole run is in recipes/RESULTS.md."""
    summary = run(tmp_path / "run", max_steps=4, num_eval_tasks=20)
    base, trained = summary["designs"]["base"], summary["designs"]["trained"]
    assert base["valid"] < 0.85 and base["score"] < 0.45, base
    assert trained["valid"] >= base["valid"] + 0.1, (base, trained)
    assert trained["score"] >= base["score"] + 0.25, (base, trained)
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    assert fmean(summary["reward"][-2:]) > fmean(summary["reward"][:2]) + 0.25, summary["reward"]
    assert summary["reward"][-1] > summary["reward"][0] + 0.4, summary["reward"]


@pytest.mark.parametrize("control", ["shuffled rewards", "no learning rate"])
def test_the_controls_do_not_learn(control: str, tmp_path: Path) -> None:
    """The search alone finds a workflow, whatever the designer learns."""
    if control == "shuffled rewards":
        summary = run(tmp_path / "run", Shuffled, max_steps=4, num_eval_tasks=20)
    else:
        summary = run(tmp_path / "run", max_steps=2, num_eval_tasks=20, learning_rate=0.0)
        policies = summary["policies"].values()
        assert all(each["sha256_before"] == each["sha256_after"] for each in policies)
    base, trained = summary["designs"]["base"], summary["designs"]["trained"]
    assert trained["score"] <= base["score"] + 0.15, (base, trained)
