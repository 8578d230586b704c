"""Which tasks a step plays."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...agents.seeds import derive_seed
from ...agents.types import Task


def tasks_of(tasks: Sequence[Task], count: int, seed: int, step: int) -> list[Task]:
    """The tasks of a step: a pure function of seed and step, so nothing that fails or is dropped
    can hold the cursor."""
    count, size = min(count, len(tasks)), len(tasks)
    chosen: list[Task] = []
    for at in range((step - 1) * count, step * count):
        epoch, place = divmod(at, size)
        order = list(range(size))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        chosen.append(tasks[order[place]])
    return list({task.id: task for task in chosen}.values())
