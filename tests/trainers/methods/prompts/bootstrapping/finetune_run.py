"""A run of fine-tuning by bootstrapping on a tiny random model.

`python -m tests.trainers.methods.prompts.bootstrapping.finetune_run FOLDER MODEL` plays one of two
steps; each rank writes its adapters' hashes and the values to FOLDER.rankN.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_finetune import (
    BootstrapFinetuneConfig,
    BootstrapFinetuneTrainer,
)
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.sirius_run import even

SHOT = [{"role": "user", "content": "1+2+3"}, {"role": "assistant", "content": "3"}]


def trainer(folder: Path, model: Path, **changes: Any) -> BootstrapFinetuneTrainer:
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        num_eval_tasks=2,
        tasks_per_step=8,
        num_generations=1,
        num_train_epochs=2,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
    )
    return BootstrapFinetuneTrainer(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:2],
        rewards=[even],
        args=BootstrapFinetuneConfig(**{**small, **changes}),
    )


def adapters(made: BootstrapFinetuneTrainer) -> dict[str, str]:
    """Hash of every adapter."""
    (base,) = made.run.learner.bases.values()
    return {policy: base.adapters.sha256(policy) for policy in base.policies}


def two_steps(folder: Path, model: Path) -> dict[str, Any]:
    """How a run ends that takes its demonstrations off, in batches small enough for two ranks."""
    values = {"first.demos": SHOT}
    made = trainer(
        folder, model, values=values, exclude_demos=True, max_steps=2, tokens_per_batch=64
    )
    made.train()
    return {"adapters": adapters(made), "values": made.run.values}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = Ranks().rank
    Path(f"{sys.argv[1]}.rank{rank}.json").write_text(
        json.dumps(two_steps(Path(sys.argv[1]), Path(sys.argv[2])))
    )
