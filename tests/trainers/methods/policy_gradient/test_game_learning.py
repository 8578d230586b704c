"""Haggling on the tiny model that talks: training one side raises its payoff against the other,
which stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.rollouts.evaluation.statistics import Evaluation, paired
from marlora.rollouts.types import Episode
from marlora.trainers.methods.imitation.sirius import SiriusConfig, SiriusTrainer
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.trainer import Trainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch.set_num_threads(1)

OTHER = {"seller": "buyer", "buyer": "seller"}


def settings(recipe: str, folder: Path) -> dict[str, Any]:
    found = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    return {**found, "output_dir": str(folder), "save_every": 1000, "proof_every": 1000}


def payoffs(trained: Trainer[Any], side: str, games: int = 60) -> tuple[Evaluation, Evaluation]:
    """Mean payoff of a side by task over sampled games of all tasks, as the bare base plays and as
    the team plays now."""
    with trained.run as run:
        tasks = [*run.spec.tasks, *run.spec.eval_tasks]
        found = (
            run.rollouts.play(tasks, run.state.with_versions({}), n=games),
            run.rollouts.play(tasks, n=games),
        )

    def means(played: list[Episode]) -> Evaluation:
        values: dict[str, list[float]] = {}
        for episode in played:
            values.setdefault(episode.task.id, []).append(
                json.loads(episode.output or "")["payoffs"][side]
            )
        return Evaluation({task: sum(each) / len(each) for task, each in values.items()})

    return means(found[0]), means(found[1])


def check(trained: Trainer[Any], side: str) -> None:
    """The 95 % interval of the side's gain, paired by task, is above 0; the other side's adapter is
    the one it was."""
    summary = trained.train()
    before, after = payoffs(trained, side)
    gain = paired(before, after)
    told = (
        f"{type(trained).__name__}, {side}: {before.accuracy:.3f} -> {after.accuracy:.3f}, {gain}"
    )
    print(told)
    assert gain["ci95"][0] > 0, told
    moved = {
        name: entry["sha256_before"] != entry["sha256_after"]
        for name, entry in summary["policies"].items()
    }
    assert moved == {"seller": side == "seller", "buyer": side == "buyer"}


@pytest.mark.parametrize(
    ("side", "seed"), [("seller", 0), ("seller", 1), ("seller", 2), ("buyer", 0)]
)
def test_training_one_side_raises_its_payoff_against_the_frozen_other(
    tmp_path: Path, side: str, seed: int
) -> None:
    args = settings("grpo_team_games", tmp_path / "run") | {
        "seed": seed,
        "policies": {OTHER[side]: {"trainable": False}},
    }
    check(GRPOTrainer(args=GRPOConfig(**args)), side)


def test_imitating_won_games_raises_the_payoff(tmp_path: Path) -> None:
    """SiriuS on the seller's won games."""
    check(SiriusTrainer(args=SiriusConfig(**settings("sirius_games", tmp_path / "run"))), "seller")
