"""What each rank does in `test_selection_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.selection_program FOLDER MODEL`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.selectors import dylan, selector

DIAGNOSER = {"diagnoser": {"prompt": "diagnose", "sampling": {"temperature": 0, "max_tokens": 80}}}


def select(folder: Path, model: Path) -> dict[str, Any]:
    """Both methods' runs: what they remember and the values in force."""
    allocated = selector(
        folder / "llmselector",
        model,
        start="given",
        alpha=0.5,
        helpers=DIAGNOSER,
        num_search_tasks=10,
        num_eval_tasks=10,
    )
    allocated.train()
    chosen = dylan(folder / "dylan", model, tasks_per_step=5, num_eval_tasks=5, max_steps=3)
    chosen.train()
    return {
        "values": [dict(allocated.run.values), dict(chosen.run.values)],
        "parts": [
            allocated.search.state_dict(),
            allocated.memory.state_dict(),
            chosen.memory.state_dict(),
        ],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    found = select(folder, model)
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(found))
