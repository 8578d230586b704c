"""What each rank does in `test_autoflow_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.autoflow_program FOLDER MODEL`. What it comes to goes to FOLDER.rankR.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from marlora.trainers.distributed.ranks import Ranks
from tests.trainers.autoflow_run import hashes, trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    made = trainer(folder, model)
    made.train()
    search = made.search.state_dict()
    text = json.dumps({"adapters": hashes(made), "values": made.run.values, "search": search})
    Path(f"{folder}.rank{ranks.rank}.json").write_text(text, encoding="utf-8")
