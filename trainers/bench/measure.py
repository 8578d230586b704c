"""What the suites of `marlora bench` share: ways of doing one piece of work, raced in turns behind
a gate, and what the machine can do.

Ways run in turns (A B A B ...) in one process, so that a machine that slows down slows all of them.
Given are medians of processor time and wall time, memory above rest, and FLOPs. If two ways do not
do the same work there is no ratio, only an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..errors import RunError
from ..model.base_models import versions

# Largest relative norm of the difference of two gradients. In bfloat16 two exact ways differ by its
# rounding.
EQUAL = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Options:
    """`repeats` of every way; `size` of the models; `engine` of suites that serve ("": all that are
    here); `opponents` of the update (none: those of the case), and of the loop that have to be
    installed first; `rho` and `device` of the update (no rho: all of them); `json`: where a suite
    of several parts writes what it has after every part ("": nowhere); `ranks`: how many play, of
    rollouts (none: one process, without the launcher).
    """

    repeats: int = 3
    size: str = "135m"
    engine: str = ""
    opponents: tuple[str, ...] = ()
    rho: tuple[float, ...] = ()
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    json: str = ""
    ranks: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Way:
    """One way of doing the work: `run` does it once and returns what the gate compares."""

    name: str
    run: Callable[[], Any]


@dataclass
class Time:
    """Of one way. Seconds of each lap; `bytes`: most memory above rest (None where the system does
    not tell); `flops`: of what was executed, counted by torch (None: not counted); `difference`:
    from the first way, as the gate sees it.
    """

    wall: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    bytes: int | None = None
    flops: int | None = None
    difference: float = 0.0

    @property
    def seconds(self) -> float:
        """The median that ratios are made of: processor time, but wall time where a GPU does the
        work."""
        return statistics.median(self.wall if torch.cuda.is_available() else self.process)

    def to_json(self) -> dict[str, Any]:
        clocks = {"wall": self.wall, "process": self.process}
        seconds = {
            name: {"median": statistics.median(laps), "smallest": min(laps)}
            for name, laps in clocks.items()
        }
        return {
            "seconds": seconds,
            "bytes_above_rest": self.bytes,
            "flops_spent": self.flops,
            "difference": self.difference,
        }


Gate = Callable[
    [Any, Any], float
]  # (what the first way returned, what another did) -> how far apart


def race(
    suite: str, ways: Sequence[Way], repeats: int, gate: Gate, most: float, *, count: bool = False
) -> dict[str, Time]:
    """Run the ways in turns, after one round that does not count, in which what they return passes
    the gate.

    Raises `RunError` if a way is further than `most` from the first. `count`: FLOPs, in the round
    that does not count.
    """
    times = {way.name: Time() for way in ways}
    first: Any = None
    for way in ways:
        with (
            FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            if count
            else contextlib.nullcontext()
        ) as counter:
            result = way.run()
        first = result if way is ways[0] else first
        apart = gate(first, result)
        if not apart <= most:
            raise RunError(
                f"bench {suite}: what {way.name!r} does is {apart:.1e} from what {ways[0].name!r}"
                f" does (at most {most:.0e}); no ratio is given"
            )
        times[way.name].difference = apart
        times[way.name].flops = counter.get_total_flops() if counter is not None else None
    for _ in range(repeats):
        for way in ways:
            time_ = times[way.name]
            with peak(time_):
                start, process = time.perf_counter(), time.process_time()
                way.run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                time_.wall.append(time.perf_counter() - start)
                time_.process.append(time.process_time() - process)
    return times


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative norm of the difference of two gradients."""
    return float((a - b).norm() / a.norm())


def same(a: Any, b: Any) -> float:
    """0 if two records are equal, else 1."""
    return float(a != b)


@contextlib.contextmanager
def peak(time_: Time) -> Any:
    """Note the most memory taken above what was taken before. On Linux by the process' own
    high-water mark, which is reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        yield
        time_.bytes = max(time_.bytes or 0, torch.cuda.max_memory_allocated() - rest)
        return
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed is no longer ours, or the peak would hide in it
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = memory("VmRSS")
    except (OSError, AttributeError):  # not Linux
        yield
        return
    yield
    time_.bytes = max(time_.bytes or 0, memory("VmHWM") - before)


def memory(field_: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is what this process takes now, VmHWM the most
    since it was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field_}:")))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": name,
        **gpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: FLOP/s of a matrix product in `dtype`, bytes/s of a copy (read
    and written)."""
    side, size = (1024, 2**26) if device == "cpu" else (8192, 2**30)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def best(run: Callable[[], Any]) -> float:
        laps, clock = [], time.process_time if device == "cpu" else time.perf_counter
        for _ in range(8):
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            laps.append(clock() - start)
        return min(laps)

    return {
        "flops_per_s": 2 * side**3 / best(lambda: a @ b),
        "bytes_per_s": 2 * size / best(lambda: target.copy_(source)),
    }


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch counts the attention kernels of GPUs; the CPU's is the same work. Like them it is counted as
# if every pair was computed.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The part of a result that is printed."""
    return {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}


def ratios(times: Mapping[str, Time], ours: str, label: str) -> dict[str, float]:
    """`OPPONENT@LABEL`: their seconds over ours."""
    return {
        f"{name}@{label}": theirs.seconds / times[ours].seconds
        for name, theirs in times.items()
        if name != ours
    }
