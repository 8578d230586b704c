"""What each rank does in `test_mas_gpt_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.mas_gpt_program FOLDER MODEL`. What it remembers goes to FOLDER.rankR.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.mas_gpt_run import words_put

SETTINGS = {"refiner": True, "num_val_tasks": 4}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    made = words_put(folder, model, **SETTINGS)
    made.train()
    text = json.dumps(made.memory.state_dict())
    Path(f"{folder}.rank{ranks.rank}.json").write_text(text, encoding="utf-8")
