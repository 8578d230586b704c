"""ScoreFlow on the tiny designer: the programs of each round are worth more than those of the one
before, and greedy ones too.

What was measured stands in recipes/RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.trainers.methods.preference.scoreflow import ScoreFlowConfig, ScoreFlowTrainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch.set_num_threads(1)


def run(folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What each round told of its programs, and the summary."""
    settings = yaml.safe_load((ROOT / "recipes" / "scoreflow.yaml").read_text())
    args = ScoreFlowConfig(
        **{**settings, "output_dir": str(folder), "ablate_adapters": False, **changes}
    )
    summary = ScoreFlowTrainer(args=args).train()
    rows = [
        json.loads(line)["scoreflow"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    print(json.dumps({"rounds": rows, "eval": summary["eval"]}))
    return rows, summary


def test_the_score_of_a_rounds_programs_rises(tmp_path: Path) -> None:
    rows, summary = run(tmp_path / "run")
    scores = [row["score"] for row in rows]
    assert scores[-1] >= scores[0] + 0.08 and rows[-1]["valid"] > 0.8, scores
    assert (
        summary["eval"]["before"]["accuracy"] < 0.1 and summary["eval"]["paired"]["ci95"][0] > 0.5
    ), summary["eval"]


def test_nothing_rises_without_a_learning_rate(tmp_path: Path) -> None:
    """The control: the same pairs, and no step."""
    rows, summary = run(tmp_path / "run", learning_rate=0.0, max_steps=2)
    assert summary["eval"]["after"] == summary["eval"]["before"]
    assert all(
        policy["sha256_before"] == policy["sha256_after"] for policy in summary["policies"].values()
    )
    assert rows[0]["pairs"] and rows[1]["score"] == pytest.approx(rows[0]["score"], abs=0.08), rows
