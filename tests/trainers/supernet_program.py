"""What each rank does in `test_maas_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.supernet_program FOLDER MODEL`. Its controller goes to FOLDER.rankR.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.supernets import trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    made = trainer(folder, model, max_steps=3, tasks_per_step=2, num_eval_tasks=4)
    made.train()
    text = json.dumps({"sha256": made.controller.sha256(), "values": made.run.values})
    Path(f"{folder}.rank{ranks.rank}.json").write_text(text, encoding="utf-8")
