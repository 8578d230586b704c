"""Plans for tests: a chain of two on a model that has learnt nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from marlora.agents.types import Reward, Task
from marlora.rollouts.types import Episode

SFT = {
    "recipe": "sft_team",
    "settings": {
        "max_steps": 2,
        "tasks_per_step": 2,
        "num_generations": 2,
        "select": "all",
        "lora_r": 2,
        "save_every": 1,
    },
}


def judge(task: Task, episode: Episode) -> Reward:
    """A quarter for everything; its name is not the one that settings call it by."""
    return Reward("judge", 0.25)


first_judge = judge


def plan_of(folder: Path, model: Path | str = "tiny", **changes: Any) -> dict[str, Any]:
    """A plan with one arm, `sft`."""
    plan: dict[str, Any] = {
        "output_dir": str(folder),
        "team": {
            "model": str(model),
            "engine": "transformers",
            "system": {"class": "marlora.agents.patterns.chain:Chain", "agents": ["first", "last"]},
            "tasks": "marlora.rollouts.tasks.toy:tiny_tasks",
            "rewards": ["exact"],
            "num_eval_tasks": 4,
            "num_val_tasks": 2,
            "max_completion_length": 3,
        },
        "budget": {"tokens": 10000},
        "seeds": [0],
        "noise_repeats": 2,
        "arms": {"sft": SFT},
    }
    return plan | changes


def written(path: Path, plan: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return path
