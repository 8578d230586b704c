"""What each rank does in `test_ppo_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.ppo_program FOLDER MODEL [SETTINGS]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.methods.policy_gradient.test_ppo import trainer

# Four updates: AdamW makes more of rounding with each, and the contract is about three.
SETTINGS = {
    "tokens_per_batch": 24,
    "num_ppo_epochs": 1,
    "num_mini_batches": 2,
    "kl_coef": 0.1,
    "max_steps": 2,
}


def learn(folder: Path, model: Path, **settings: Any) -> dict[str, str]:
    """Hashes of adapters and critics after two steps."""
    made = trainer(folder, model, **{**SETTINGS, **settings})
    made.train()
    hashes = {
        name: head.sha256()
        for base in made.run.learner.bases.values()
        for name, head in base.heads.items()
    }
    return hashes | {
        f"policy {p}": base.adapters.sha256(p)
        for base in made.run.learner.bases.values()
        for p in base.policies
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    found = learn(folder, model, **json.loads("".join(sys.argv[3:]) or "{}"))
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(found))
