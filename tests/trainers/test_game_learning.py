"""Haggling on the tiny model that talks: training one side raises its payoff against the other, which stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.rollouts.types import Episode
from marlora.trainers.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.sirius import SiriusConfig, SiriusTrainer
from marlora.trainers.trainer import Trainer
from tests.repository import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch.set_num_threads(1)

SETTINGS = yaml.safe_load((ROOT / "recipes" / "sirius_games.yaml").read_text())
SHARED = ("system", "agents", "tasks", "task_args", "engine", "model", "max_completion_length", "max_concurrency")
ADAPTERS = ("lora_r", "lora_alpha", "lora_target_modules", "num_eval_tasks")


def grpo(folder: Path, side: str, **changes: Any) -> GRPOTrainer:
    """Group-relative credit of each player's own payoff; the other side is frozen."""
    settings = {key: SETTINGS[key] for key in SHARED + ADAPTERS}
    other = {"seller": "buyer", "buyer": "seller"}[side]
    metric = {"seller": "first_payoff", "buyer": "second_payoff"}[side]
    settings |= dict(
        output_dir=str(folder), credit="dr_mas", rewards=[f"marlora.rollouts.games:{name}" for name in (metric, "payoff")],
        policies={other: {"trainable": False}}, max_steps=8, tasks_per_step=16, num_generations=16, learning_rate=4e-3, save_every=1000,
        proof_every=8,
    )  # fmt: skip
    return GRPOTrainer(args=GRPOConfig(**settings | changes))


def payoffs(trained: Trainer[Any], games: int = 12) -> tuple[dict[str, float], dict[str, float]]:
    """Mean payoff of both players over sampled games of all tasks, as the bare base plays and as the team plays now."""
    with trained.run as run:
        tasks = [*run.tasks, *run.eval_tasks]
        found = run.play("base", tasks, games, versions={}), run.play("now", tasks, games)

    def means(played: list[Episode]) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for episode in played:
            for name, each in json.loads(episode.output or "")["payoffs"].items():
                values.setdefault(name, []).append(each)
        return {name: sum(each) / len(each) for name, each in values.items()}

    return means(found[0]), means(found[1])


def check(trained: Trainer[Any], side: str, gain: float) -> None:
    summary = trained.train()
    before, after = payoffs(trained)
    told = f"{type(trained).__name__}, {side}: {before} -> {after}"
    print(told)
    assert after[side] - before[side] >= gain, told
    moved = {name: entry["sha256_before"] != entry["sha256_after"] for name, entry in summary["policies"].items()}
    assert moved == {"seller": side == "seller", "buyer": side == "buyer"}, "the other side is the one it was"


@pytest.mark.parametrize(("side", "seed"), [("seller", 0), ("seller", 1), ("seller", 2), ("buyer", 0)])
def test_training_one_side_raises_its_payoff_against_the_frozen_other(tmp_path: Path, side: str, seed: int) -> None:
    check(grpo(tmp_path / "run", side, seed=seed), side, gain=0.3)


def test_imitating_won_games_raises_the_payoff(tmp_path: Path) -> None:
    """The recipe as it stands: SiriuS on the seller's won games."""
    check(SiriusTrainer(args=SiriusConfig(**SETTINGS | {"output_dir": str(tmp_path / "run")})), "seller", gain=0.15)
