"""How much each part of `marlora bench gpu` does, by `--size`, and what an NVIDIA GPU could do."""

from __future__ import annotations

from dataclasses import dataclass

from ....agents.types import SettingError, nearest
from ..measure import Options
from ..update import Case


@dataclass(frozen=True)
class Work:
    """Of one size.

    Args:
        update: geometries that take an optimizer step, with each of the numbers of adapters.
        case: sequences of every adapter in that step.
        trees: trees of about 20 leaves, on the first of these geometries.
        head: terms, hidden size and vocabulary of the language-model head.
        served: geometry that is served, published to and trained in a whole loop.
        callers: requests at once; reply: tokens of each.
        loop: tasks of a step, episodes of a task, steps.
    """

    update: tuple[str, ...]
    case: Case
    trees: tuple[Case, ...]
    head: tuple[int, int, int]
    served: str
    callers: int
    reply: int
    loop: tuple[int, int, int]
    adapters: tuple[int, ...] = (1, 8)


WORK = {
    "tiny": Work(
        ("tiny",),
        Case(2, 6, 3),
        (Case(20, 12, 2, full=True),),
        (32, 16, 264),
        "tiny",
        8,
        8,
        (2, 2, 3),
    ),
    "qwen3-4b": Work(
        ("qwen3-1.7b", "qwen3-4b"),
        Case(8, 1024, 512, full=True),
        (Case(20, 512, 64, full=True), Case(20, 2048, 256, full=True)),
        (8192, 2048, 151936),
        "qwen3-1.7b",
        64,
        128,
        (8, 8, 5),
    ),
}

# Dense bfloat16 FLOP/s of NVIDIA's data sheets; the first name found in the device's decides.
PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def work_of(options: Options) -> Work:
    """The work of `options.size`. Raises `SettingError` for another, or without a GPU for what
    needs one."""
    if options.size not in WORK:
        raise SettingError(f"bench gpu --size {options.size}: {nearest(options.size, WORK)}")
    if options.device == "cpu" and options.size != "tiny":
        raise SettingError(
            f"bench gpu --size {options.size}: no GPU is seen here; --size tiny runs every part on"
            " a CPU"
        )
    return WORK[options.size]


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bfloat16 by the data sheet; None for a device that is not listed."""
    return next((flops for name, flops in PEAK.items() if name in device_name), None)
