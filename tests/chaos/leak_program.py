"""A run of many small steps that tells, after every tenth, what its process holds: `python -m
tests.chaos.leak_program FOLDER MODEL STEPS`."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.trainers.small_run import trainer


def held() -> dict[str, int]:
    """What this process holds: bytes of memory, descriptors, threads, children, tensors."""
    gc.collect()
    me = psutil.Process()
    return {
        "memory": me.memory_info().rss,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(me.children(recursive=True)),
        "tensors": sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[3])
    made = trainer(
        folder,
        sys.argv[2],
        max_steps=steps,
        tasks_per_step=1,
        num_generations=2,
        max_completion_length=2,
        proof_every=10,
        save_every=25,
    )
    real = made.run.finish
    found: list[dict[str, int]] = []

    def finish(step: int, *args: Any) -> None:
        real(step, *args)
        if step % 10 == 0:
            found.append(held())

    made.run.finish = finish  # type: ignore[method-assign]
    made.train()
    Path(f"{folder}.held.json").write_text(json.dumps(found))
