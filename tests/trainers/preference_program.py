"""What two ranks do in `test_preference_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.preference_program FOLDER MODEL`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.methods.preference.test_sysdpo import trainer


def learn(folder: Path, model: Path) -> dict[str, Any]:
    """Adapters' hashes after two steps of each mode whose work is shared out: in batches small
    enough for two ranks."""
    found = {}
    for mode in ("joint", "sampling"):
        # At a learning rate of use: Adam makes a whole step of the rounding of a gradient that is
        # nearly 0.
        made = trainer(
            folder / mode, model, mode=mode, max_steps=2, tokens_per_batch=24, learning_rate=1e-3
        )
        made.train()
        found[mode] = {
            policy: base.adapters.sha256(policy)
            for base in made.run.learner.bases.values()
            for policy in base.policies
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(learn(folder, model)))
