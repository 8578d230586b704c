"""Benchmark of asynchronous rollouts against a barrier after every turn, under long-tailed
latencies.

The engine computes nothing: it answers after a time that follows from the prompt alone (log-normal,
from a seed), so every way waits for the same replies. With a barrier, as trainers that batch a turn
over all episodes have it, a turn takes as long as its slowest reply. `oversampled` begins a quarter
more episodes of every task and drops the last: other episodes than the first two, so it passes no
gate, and what it dropped is given with it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import statistics
import time
import zlib
from collections.abc import Sequence
from typing import Any

from ...agents.patterns.chain import Chain
from ...agents.types import Completion, Sampling, Task
from ...rollouts.engines.base import ModelRef
from ...rollouts.engines.scripted import ScriptedEngine
from ...rollouts.episodes.completers import EngineCompleter
from ...rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from ...rollouts.episodes.runner import EpisodeLimits, EpisodeRunner, episode_requests
from ...rollouts.types import Episode
from .measure import Options, Way, machine, race, same, table

AGENTS = ("planner", "solver", "reviewer", "editor")
TASKS, GROUP, EXTRA = 8, 8, 2
MEDIAN = {"tiny": 0.002}  # seconds of a reply; of other sizes 0.05
SIGMA = 1.0  # of its logarithm: one reply in twenty takes five times the median


class Sleepy(ScriptedEngine):
    """Answers after a time that follows from the prompt; with `barrier`, when all that are in play
    have asked, and all at once."""

    def __init__(self, median: float, barrier: int = 0) -> None:
        super().__init__(lambda prompt, ref, sampling, k: str(zlib.crc32(prompt.encode())))
        self.median, self.playing = median, barrier
        self._waiting: list[tuple[float, asyncio.Future[None]]] = []

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        rng = random.Random(zlib.crc32(repr(tuple(ids)).encode()))
        seconds = self.median * math.exp(rng.gauss(0.0, SIGMA))
        if not self.playing:
            await asyncio.sleep(seconds)
        else:
            answered = asyncio.get_running_loop().create_future()
            self._waiting.append((seconds, answered))
            if len(self._waiting) == self.playing:
                turn, self._waiting = self._waiting, []
                asyncio.get_running_loop().call_later(
                    max(s for s, _ in turn), _release, [future for _, future in turn]
                )
            await answered
        return await super().generate(ids, ref, sampling, n, replica=replica)


def _release(turn: Sequence[asyncio.Future[None]]) -> None:
    for answered in turn:
        answered.set_result(None)


def rollout(options: Options) -> dict[str, Any]:
    """Seconds to play a step's episodes both ways, and over-sampled."""
    median = MEDIAN.get(options.size, 0.05)
    dropped: list[CancelledEpisode] = []
    kept: list[Episode] = []

    def oversampled() -> None:
        dropped.clear()
        kept[:] = asyncio.run(_play(Sleepy(median), GROUP + EXTRA, dropped))

    times = race(
        "rollout",
        [
            Way("episodes", lambda: _record(asyncio.run(_play(Sleepy(median), GROUP)))),
            Way(
                "barrier", lambda: _record(asyncio.run(_play(Sleepy(median, TASKS * GROUP), GROUP)))
            ),
        ],
        options.repeats,
        same,
        0.0,
    )
    extra = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        oversampled()
        extra.append(time.perf_counter() - start)
    seconds = {name: statistics.median(time_.wall) for name, time_ in times.items()} | {
        "oversampled": statistics.median(extra)
    }
    joined = {
        f"{name}@{SIGMA:g}": s / seconds["episodes"]
        for name, s in seconds.items()
        if name != "episodes"
    }
    lengths = drop_statistics(kept, dropped)
    rows = [[name, f"{s:.3f}", f"{s / seconds['episodes']:.2f}"] for name, s in seconds.items()]
    return {
        "suite": "rollout",
        "clock": "wall",
        **machine(),
        "agents": len(AGENTS),
        "episodes": TASKS * GROUP,
        "median_latency_s": median,
        "sigma": SIGMA,
        "seconds": seconds,
        "ratios": joined,
        "oversampled": {"begun": TASKS * (GROUP + EXTRA), **lengths},
        **table(
            f"rollout: {TASKS * GROUP} episodes of {len(AGENTS)} turns",
            ["way", "median, s", "over ours"],
            rows,
        ),
    }


async def _play(
    engine: Sleepy, generations: int, dropped: list[CancelledEpisode] | None = None
) -> list[Episode]:
    speakers = {name: EngineCompleter(engine, engine.tokens, name) for name in AGENTS}
    rollouts = EpisodeRunner(
        Chain(list(AGENTS)),
        speakers,
        limits=EpisodeLimits(concurrency=TASKS * (GROUP + EXTRA)),
        sampling=Sampling(seed=0),
    )
    plan = episode_requests(
        [Task(str(k), f"task {k}") for k in range(TASKS)],
        label="bench",
        num_generations=generations,
    )
    # The samples of a task differ by the prompt, for the engine's answer follows from it.
    plan = [
        dataclasses.replace(
            job, task=dataclasses.replace(job.task, prompt=f"{job.task.prompt}.{job.sample}")
        )
        for job in plan
    ]
    if dropped is None:
        return [episode async for episode in rollouts.collect(plan)]
    per_group = {job.group: GROUP for job in plan}
    return [episode async for episode in first_finished(rollouts, plan, None, per_group, dropped)]


def _record(episodes: Sequence[Episode]) -> list[tuple[str, str]]:
    return sorted((episode.id, str([turn.text for turn in episode.turns])) for episode in episodes)
