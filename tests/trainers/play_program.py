"""What each rank does in `test_rank_play.py`: `torchrun --nproc_per_node N -m
tests.trainers.play_program FOLDER MODEL [FAULT]`. Which episodes it played goes to
FOLDER.rankR.json."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeRunner
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.small_run import bytes_mod_7, config


def trainer(
    folder: Path, model: Path, *, resume: bool = False, asked: Callable[[], None] = lambda: None
) -> GRPOTrainer:
    """A run without trained weights, whose replies follow from the prompt and the seed, as a
    model's do. `asked` is called before every reply."""

    def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        asked()
        return str((len(prompt) * 7 + (sampling.seed or 0) + k) % 97)

    settings = config(
        folder,
        model,
        policies={name: {"trainable": False} for name in ("first", "last")},
        tasks_per_step=4,
        num_eval_tasks=4,
        resume=resume,
    )
    return GRPOTrainer(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:4],
        rewards=[bytes_mod_7],
        args=settings,
        engine=ScriptedEngine(answer, latency=0.002),
    )


def note(played: list[str]) -> None:
    """Put down the ids of the episodes that this process plays."""
    real = EpisodeRunner._play

    async def noted(self: Any, request: Any, start: Any) -> Any:
        played.append(request.id)
        return await real(self, request, start)

    EpisodeRunner._play = noted  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    folder, model, fault = Path(sys.argv[1]), Path(sys.argv[2]), "".join(sys.argv[3:])
    ranks, played = Ranks(), list[str]()
    note(played)

    def asked() -> None:
        if fault == "kill" and ranks.rank == 1 and len(played) > 8:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer(folder, model, resume=fault == "resume", asked=asked).train()
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(played), encoding="utf-8")


if __name__ == "__main__":
    main()
