"""Two ranks of which one stalls, for `test_ranks.py`: `torchrun --nproc_per_node 2 -m
tests.trainers.stalled_program sleep|frozen`."""

from __future__ import annotations

import ctypes
import sys
import time

import torch

from marlora.trainers.distributed import ranks as ranks_
from marlora.trainers.distributed.ranks import Ranks


def stall_here() -> None:
    time.sleep(3600)


def freeze_here() -> None:
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL it keeps the interpreter's lock


if __name__ == "__main__":
    how = sys.argv[1]
    if how == "frozen":  # sooner than a minute
        real = ranks_.Watchdog
        ranks_.Watchdog = lambda name, rank, size, frozen: real(name, rank, size, 3.0)  # type: ignore[assignment,misc]
    ranks = Ranks(seconds=3.0 if how == "sleep" else 3600.0)
    ranks.sum_([torch.ones(1)])
    time.sleep(1.5)  # what takes its time is not hung
    if ranks.rank == 1:
        stall_here() if how == "sleep" else freeze_here()
    ranks.sum_([torch.ones(1)])
    print("was not reached")
