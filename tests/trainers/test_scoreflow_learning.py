"""ScoreFlow on the tiny model: programs of held-out problems get better over rounds; plain DPO on rounds of its own beside it.

What was measured stands in recipes/RESULTS.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.trainers.scoreflow import ScoreFlowConfig, ScoreFlowTrainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
torch.set_num_threads(1)


def learnt(folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Of one run of the recipe: the mean score of each round's programs, the shares of valid ones, and the mean score of sampled programs of
    held-out problems before and after."""
    settings = yaml.safe_load((ROOT / "recipes" / "scoreflow.yaml").read_text())
    made = ScoreFlowTrainer(
        args=ScoreFlowConfig(**{**settings, "output_dir": str(folder), "seed": seed, **changes}), recipe="scoreflow"
    )
    with made.run as run:
        before = score(made, "before", {})
        for step in run.steps():
            episodes = made.collect(step)
            run.finish(step, episodes, made.learn(step, episodes))
        after = score(made, "after", None)
    rows = [json.loads(line)["scoreflow"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "before": before, "after": after, "rounds": [row["score"] for row in rows], "valid": [row["valid"] for row in rows],
        "margin": [row.get("margins", {}).get("designer") for row in rows],
    }  # fmt: skip


def score(made: ScoreFlowTrainer, label: str, versions: dict[str, str] | None) -> float:
    """Of four sampled programs of each of 40 held-out problems, each run once."""
    episodes = made.run.play(label, made.run.eval_tasks[:40], 4, versions)
    return sum(e.reward("exact") for e in episodes) / len(episodes)


@pytest.mark.parametrize("seed", [0])
def test_programs_get_better_over_rounds(tmp_path: Path, seed: int) -> None:
    flow, plain = (learnt(tmp_path / objective, seed, objective=objective) for objective in ("score_dpo", "dpo"))
    told = f"seed {seed}: ScoreFlow {flow}; DPO {plain}"
    print(told)
    assert flow["rounds"][-1] >= flow["rounds"][0] + 0.15 and flow["after"] >= flow["before"] + 0.25, told
    assert flow["margin"][-1] > 0 and flow["valid"][-1] >= flow["valid"][0] - 0.05, told
    assert plain["after"] >= plain["before"] + 0.15, told
