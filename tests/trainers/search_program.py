"""What each rank does in `test_search_ranks.py`: `torchrun --nproc_per_node N -m
tests.trainers.search_program FOLDER MODEL`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.workflow_search.adas import ADASConfig, ADASTrainer
from marlora.trainers.methods.workflow_search.debflow import HELPERS, DebFlowConfig, DebFlowTrainer
from tests.trainers.searches import Propose, larger_ensemble, random_words, search


def inventing(role: str, prompt: str) -> str:
    """A proposer whose first program breaks and is repaired."""
    code = "import nothing\nawait custom('x')"
    if "This program went wrong:" in prompt:
        code = "await ensemble([await custom(str(n)) for n in range(5)])"
    return json.dumps({"thought": "vote", "name": "vote", "code": code})


def debating(role: str, prompt: str) -> str:
    """Sides of which one knows more, and a moderator who sides with that one."""
    sides: dict[str, Propose] = {"affirmative": larger_ensemble, "negative": random_words}
    return sides[role](role, prompt) if role in sides else "affirmative"


def searched(folder: Path, model: Path) -> dict[str, Any]:
    """A run of each search: archive, memory and the values in force."""
    edited = search(folder / "aflow", model, larger_ensemble, pick_tasks=4, pick_rounds=2)
    edited.train()
    invented = search(
        folder / "adas",
        model,
        inventing,
        cls=ADASTrainer,
        config=ADASConfig,
        seeds=["chain of thought"],
        max_steps=1,
    )
    debated = search(
        folder / "debflow",
        model,
        debating,
        cls=DebFlowTrainer,
        config=DebFlowConfig,
        helpers=HELPERS,
        max_steps=1,
    )
    runs = (edited, invented, debated)
    for each in (invented, debated):
        each.train()
    return {
        "values": [dict(each.run.values) for each in runs],
        "parts": [part.state_dict() for each in runs for part in (each.search, each.memory)],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    archives = searched(folder, model)
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(archives), encoding="utf-8")
