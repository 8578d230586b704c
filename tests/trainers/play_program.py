"""What each rank does in `test_rank_players.py`: `torchrun --nproc_per_node N -m
tests.trainers.play_program FOLDER MODEL [FAULT]`. Which episodes it played goes to
FOLDER.rankR.json."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeRunner
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.trainers.small_run import bytes_mod_7, config


def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """Follows from the prompt and the seed, as a model's does."""
    return str((len(prompt) * 7 + (sampling.seed or 0) + k) % 97)


class Noted(EpisodeRunner):
    """Notes the episodes that are played in this process, and fails on demand."""


def trainer(folder: Path, model: Path, fault: str, played: list[str]) -> GRPOTrainer:
    rank = int(os.environ.get("RANK", "0"))

    def spoken(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        if fault == "kill" and rank == 1 and len(played) > 8:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "engine" and rank == 1 and len(played) > 8:
            raise EngineError("scripted: no answer")
        return answer(prompt, ref, sampling, k)

    real = EpisodeRunner._play

    async def noted(self: Any, request: Any, start: Any) -> Any:
        played.append(request.id)
        return await real(self, request, start)

    EpisodeRunner._play = noted  # type: ignore[method-assign]
    settings = config(
        folder,
        model,
        policies={name: {"trainable": False} for name in ("first", "last")},
        tasks_per_step=4,
        num_eval_tasks=4,
        resume=fault == "resume",
    )
    return GRPOTrainer(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:4],
        rewards=[bytes_mod_7],
        args=settings,
        engine=ScriptedEngine(spoken, latency=0.002),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model, fault = Path(sys.argv[1]), Path(sys.argv[2]), "".join(sys.argv[3:])
    ranks, played = Ranks(), list[str]()
    trainer(folder, model, fault, played).train()
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(played), encoding="utf-8")
