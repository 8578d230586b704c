"""`marlora bench agents`: what one more agent costs. N agents as N adapters on one base, as marlora
trains them, against N copies of the base.

Each agent takes one optimizer step from tokens of its own. Every number of agents and either way
has a process of its own, so that one's memory is not another's: `python -m
marlora.trainers.bench.agents WAY N SIZE REPEATS DEVICE` prints what one measured.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from ...agents.types import PolicySpec
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError
from ..methods.policy_gradient.grpo import GRPOConfig
from ..model.adapters import Adapters
from ..testbeds.pretraining import one_thread
from ..update.losses.policy_gradient import policy_loss
from ..update.optimizer_step import Optimizers, update
from .geometry import check_size, network
from .measure import Options, machine, memory, table
from .update import SCALE, Case, recorded

NUMBERS = (1, 2, 4, 8)
CASE = Case(4, 48, 12)
WAYS = ("adapters", "copies")


def agents(options: Options) -> dict[str, Any]:
    """Tokens per second and peak memory at 1, 2, 4 and 8 agents, both ways, in turns."""
    check_size(options.size)
    by_way: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    for number in NUMBERS:
        for way in WAYS:
            by_way[way][str(number)] = _child(way, number, options)
    for n, learnt in by_way["adapters"].items():
        if learnt.pop("sha256") != by_way["copies"][n].pop("sha256"):
            raise RunError(
                f"bench agents: {n} adapters on one base and on {n} copies learnt other weights; no"
                " numbers are given"
            )
    first, last = (
        by_way["adapters"][str(number)]["peak_bytes"] for number in (NUMBERS[0], NUMBERS[-1])
    )
    rows = [
        [
            str(n),
            *(f"{by_way[way][str(n)]['tokens_per_second']:,.0f}" for way in WAYS),
            *(f"{by_way[way][str(n)]['peak_bytes'] / 2**30:.2f}" for way in WAYS),
        ]
        for n in NUMBERS
    ]
    columns = [
        "agents",
        *(f"{way}, tokens/s" for way in WAYS),
        *(f"{way}, peak GiB" for way in WAYS),
    ]
    return {
        "suite": "agents",
        "size": options.size,
        **machine(),
        "agents": by_way["adapters"],
        "copies": by_way["copies"],
        "peak_of_most_over_one": last / first,
        **table(f"agents: {options.size}, one optimizer step of every agent", columns, rows),
    }


def _child(way: str, number: int, options: Options) -> dict[str, Any]:
    argv = [
        sys.executable,
        "-m",
        __name__,
        way,
        str(number),
        options.size,
        str(options.repeats),
        options.device,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RunError(
            f"bench agents: {way} of {number} agents failed; no numbers are"
            f" given\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def measured(way: str, number: int, options: Options) -> dict[str, Any]:
    """In a process of its own: tokens (prompts and replies, as the agents read and wrote them) per
    second, the process' peak memory, and a hash of what all adapters have become."""
    config, ranks = GRPOConfig(), Ranks()
    ranks.device = torch.device(options.device)
    names = [f"agent{k}" for k in range(number)]
    samples = {
        name: recorded(CASE.times(SCALE.get(options.size, 1)), seed=k, policy=name)
        for k, name in enumerate(names)
    }
    teams = [names] if way == "adapters" else [[name] for name in names]
    optimizers_of = [_optimizers(team, config, options) for team in teams]
    clock, laps = time.process_time if options.device == "cpu" else time.perf_counter, []
    for step in range(1, options.repeats + 2):
        start = clock()
        for team, optimizers in zip(teams, optimizers_of, strict=True):
            own = [sample for name in team for sample in samples[name]]
            update(optimizers, own, lambda inputs: policy_loss(inputs, config), step, ranks)
        if options.device != "cpu":
            torch.cuda.synchronize()
        laps.append(clock() - start)
    peak = memory("VmHWM") if options.device == "cpu" else torch.cuda.max_memory_allocated()
    tokens = sum(len(sample.ids) for own in samples.values() for sample in own)
    hashes = [
        optimizers.adapters.sha256(name)
        for team, optimizers in zip(teams, optimizers_of, strict=True)
        for name in team
    ]
    return {
        "tokens_per_second": tokens / statistics.median(laps[1:]),
        "peak_bytes": peak,
        "sha256": hashes,
    }


def _optimizers(team: list[str], config: RunConfig, options: Options) -> Optimizers:
    policies = [PolicySpec(name) for name in team]
    return Optimizers(
        Adapters(network(options.size, options.device, options.dtype), policies, seed=0), config
    )


if __name__ == "__main__":
    way, number, size, repeats, device = sys.argv[1:]
    with one_thread():
        print(json.dumps(measured(way, int(number), Options(int(repeats), size, device=device))))
