"""An A-BAD-BO run on a tiny random model.

`python -m tests.trainers.methods.selection.abadbo_run FOLDER MODEL` plays one on each rank, which
writes what it ends with to FOLDER.rankN.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.trainers.methods.selection.abadbo import ABADBOConfig, ABADBOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain

SCORE = "tests.trainers.sirius_run:even"


def trainer(folder: Path, model: Path | str, **changes: Any) -> ABADBOTrainer:
    """Two targets, two training runs of four updates, of which every second is kept."""
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="marlora.rollouts.tasks.toy:tiny_tasks",
        rewards=[SCORE],
        num_eval_tasks=4,
        num_val_tasks=6,
        tasks_per_step=8,
        num_generations=1,
        select="all",
        num_targets=2,
        teams_per_target=2,
        num_local_runs=2,
        num_train_epochs=2,
        train_batch_size=4,
        checkpoint_every=2,
        max_completion_length=4,
        lora_r=2,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        tokens_per_batch=64,
        proof_every=9,
        ablate_adapters=False,
    )
    return ABADBOTrainer(system=tiny_chain(), args=ABADBOConfig(**{**small, **changes}))


def adapters(made: ABADBOTrainer) -> dict[str, str]:
    """Hash of every adapter."""
    (base,) = made.run.learner.bases.values()
    return {policy: base.adapters.sha256(policy) for policy in base.policies}


def end(made: ABADBOTrainer) -> dict[str, Any]:
    """What a run ends with: adapters, and what it remembers."""
    memory: dict[str, Any] = json.loads(json.dumps(made.memory.state_dict()))
    return {"adapters": adapters(made), "memory": memory}


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = trainer(Path(sys.argv[1]), sys.argv[2])
    made.train()
    Path(f"{sys.argv[1]}.rank{made.run.ranks.rank}.json").write_text(
        json.dumps(end(made)), encoding="utf-8"
    )
