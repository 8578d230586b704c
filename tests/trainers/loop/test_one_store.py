"""One store, four trainings: what GRPO has played is learnt from by GRPO, SysDPO, SFT and PPO, as
it lies there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.methods.imitation.sft import SFTTrainer
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.methods.policy_gradient.ppo import PPOTrainer
from marlora.trainers.methods.preference.sysdpo import PreferenceTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from marlora.trainers.trainer import Trainer
from tests.trainers import small_run

TRAINERS: dict[type[Trainer[Any]], dict[str, Any]] = {
    GRPOTrainer: {},
    PreferenceTrainer: {},
    SFTTrainer: {"success_threshold": 0.5},
    PPOTrainer: {},
}


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "episodes").rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, run of the GRPO trainer)"""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("played")
    model = tiny_random_model(folder / "model")
    small_run.trainer(folder / "run", model, max_steps=1).train()
    return model, folder / "run"


@pytest.mark.parametrize("method", TRAINERS, ids=lambda method: method.__name__)
def test_what_grpo_played_trains_every_method(
    tmp_path: Path, played: tuple[Path, Path], method: type[Trainer[Any]]
) -> None:
    """Both adapters move, from the store's episodes alone; the learner plays its evaluations only,
    and the store stays as it was."""
    model, store = played
    before = hashes(store)
    small = dataclasses.asdict(
        small_run.config(tmp_path / "run", model, episodes=str(store), max_steps=1)
    )
    shared = {f.name for f in dataclasses.fields(method.Config)} - {"credit", "beta", "loss_type"}
    args = method.Config(
        **{**{name: value for name, value in small.items() if name in shared}, **TRAINERS[method]}
    )
    learner = method(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=[small_run.bytes_mod_7],
        args=args,
    )
    summary = learner.train()
    assert all(
        summary["policies"][name]["sha256_before"] != summary["policies"][name]["sha256_after"]
        for name in ("first", "last")
    )
    assert summary["live_proof"]["failed"] == 0 < summary["live_proof"]["passed"]
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert row["episodes"] == small_run.EPISODES and all(
        row["policies"][name]["tokens"] > 0 for name in ("first", "last")
    )
    assert {e.group.split("-")[0] for e in Store(tmp_path / "run" / "episodes")} == {"eval"}
    assert hashes(store) == before
