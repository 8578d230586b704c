"""A SiriuS run on a tiny random model, and what two ranks do: `torchrun --nproc_per_node N -m
tests.trainers.sirius_run FOLDER MODEL`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Task
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.imitation.sirius import SiriusConfig, SiriusTrainer
from marlora.trainers.testbeds.tiny import tiny_chain

GOLD = "gold-5309"  # stands in no task and no model says it


def even(task: Task, episode: Episode) -> float:
    """A success that no model has learnt, and about every second reply is."""
    return float(sum(str(episode.output).encode()) % 2 == 0)


def trainer(folder: Path, model: Path, **changes: Any) -> SiriusTrainer:
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        num_eval_tasks=2,
        tasks_per_step=6,
        num_generations=1,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
        proof_every=3,
        repair="all",
        max_regenerations=2,
    )
    tasks = [Task(t.id, t.prompt, GOLD, t.source, t.split, t.meta) for t in tiny_tasks()[:40]]
    held_out = tiny_tasks("eval")[:2]
    args = SiriusConfig(**{**small, **changes})
    return SiriusTrainer(
        system=tiny_chain(), tasks=tasks, eval_tasks=held_out, rewards=[even], args=args
    )


def learn(folder: Path, model: Path) -> dict[str, str]:
    """Adapters' hashes after two iterations that learn from one library, in batches small enough
    for two ranks."""
    made = trainer(folder, model, max_iterations=2, library="all", tokens_per_batch=64)
    made.train()
    return {
        p: base.adapters.sha256(p)
        for base in made.run.learner.bases.values()
        for p in base.policies
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = Ranks()
    Path(f"{sys.argv[1]}.rank{ranks.rank}.json").write_text(
        json.dumps(learn(Path(sys.argv[1]), Path(sys.argv[2])))
    )
