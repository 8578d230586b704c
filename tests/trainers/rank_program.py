"""What two ranks do in `test_ranks.py`: `torchrun --nproc_per_node N -m tests.trainers.rank_program
FOLDER MODEL [SETTINGS]`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Message, to_json
from marlora.trainers.distributed.ranks import RankError, Ranks
from marlora.trainers.errors import Stopped
from marlora.trainers.loop.run import RunError
from marlora.trainers.update import optimizer_step
from tests.trainers.small_run import trainer


def talk(ranks: Ranks) -> dict[str, Any]:
    """Every way in which ranks speak to one another."""
    mine = [torch.tensor([1.0 + ranks.rank, 0.0]), torch.tensor([[float(10**ranks.rank)]])]
    ranks.sum_(mine)
    who = f"rank {ranks.rank}"
    found: dict[str, Any] = {
        "rank": ranks.rank,
        "size": ranks.size,
        "device": str(ranks.device),
        "sum": [t.tolist() for t in mine],
        "broadcast": ranks.broadcast({"text": "häß", "rank": ranks.rank}),
        "gather": ranks.gather("x" * ranks.rank),
        "any": ranks.any(ranks.rank == 1),
        "none": ranks.any(False),
        "on_main": ranks.on_main(lambda: ranks.rank),
        "share": [to_json(m) for m in ranks.share(lambda: [Message("user", who)], Message)],
        "raised": [],
    }

    def fail(error: BaseException) -> None:
        raise error

    for error in (RunError("the disk is full"), Stopped()):
        try:
            ranks.on_main(lambda error=error: fail(error))
        except (RunError, RankError, Stopped) as raised:
            found["raised"].append(f"{type(raised).__name__} {raised}".strip())
    return found


def learn(folder: Path, model: Path, **settings: Any) -> dict[str, Any]:
    """Three steps. In the second all turns of an agent are packed as for one rank into one batch,
    so that the other has none of them."""
    made = trainer(folder, model, **settings)
    run, real, batches = made.run.open(), optimizer_step.split_over_ranks, []

    def whole(pack: Any, samples: Any, **how: Any) -> Any:
        return pack(samples, **(how | {"parts": 1}))

    def counted(*args: Any) -> Any:
        dealt = real(*args)
        batches.append([len(part) for part in dealt])
        return dealt

    optimizer_step.split_over_ranks = counted
    pack = optimizer_step.pack
    for step in run.steps():
        optimizer_step.pack = functools.partial(whole, pack) if step == 2 else pack
        made.args.tokens_per_batch = 8192 if step == 2 else 24
        run.finish(step, made.step(step))
    result = run.evaluator.evaluate("after")
    made.train()  # nothing is left to do: evaluates, writes the summary on rank 0 alone, closes
    hashes = {
        p: base.adapters.sha256(p) for base in run.learner.bases.values() for p in base.policies
    }
    parameters = [
        p for base in run.learner.bases.values() for p in base.adapters.model.parameters()
    ]
    split = {str(tuple(p.to_local().shape)) for p in parameters if hasattr(p, "to_local")}
    split |= {
        f"{p.ds_tensor.numel()} of {p.ds_numel}" for p in parameters if hasattr(p, "ds_tensor")
    }
    return {
        "batches": batches,
        "sha256": hashes,
        "evaluated": result is not None,
        "split": sorted(split),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = Ranks()
    found = {
        **(talk(ranks) if ranks.size > 1 else {}),
        **learn(folder, model, **json.loads("".join(sys.argv[3:]) or "{}")),
    }
    Path(f"{folder}.rank{ranks.rank}.json").write_text(json.dumps(found))
