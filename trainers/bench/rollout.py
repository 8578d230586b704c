"""Benchmark of asynchronous rollouts against a barrier after every turn, under long-tailed
latencies.

The engine computes nothing: it answers after a time that follows from the prompt alone (log-normal,
from a seed), so every way waits for the same replies. With a barrier, as trainers that batch a turn
over all episodes have it, a turn takes as long as its slowest reply. `oversampled` begins a quarter
more episodes of every task and drops the last: other episodes than the first two, so it passes no
gate, and what it dropped is given with it.

With `--ranks` also: calls per second and processor time per call where several ranks play
(`rank_players.py`). Each count is a `torchrun` of this file, whose ranks play the same episodes,
each with an engine of its own, so that what is measured is the cost of playing: rendering,
recording, scoring, sending, and storing, which rank 0 does. The gate: every count plays the
episodes of the first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...agents.patterns.chain import Chain
from ...agents.state import TeamState
from ...agents.types import Completion, Sampling, Task
from ...rollouts.engines.base import ModelRef
from ...rollouts.engines.scripted import ScriptedEngine
from ...rollouts.episodes.completers import EngineCompleter
from ...rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from ...rollouts.episodes.runner import (
    EpisodeLimits,
    EpisodeRequest,
    EpisodeRunner,
    episode_requests,
)
from ...rollouts.episodes.store import Store
from ...rollouts.ledger import Ledger
from ...rollouts.types import Episode
from ..collection.background import BackgroundLoop
from ..collection.player_service import SAMPLED, PlayerService
from ..collection.rank_players import RankPlayers
from ..distributed.ranks import Ranks
from ..errors import RunError

if TYPE_CHECKING:  # a rank of a launch needs no model, and is quicker without its libraries
    from .measure import Options

T = TypeVar("T")
AGENTS = ("planner", "solver", "reviewer", "editor")
TASKS, GROUP, EXTRA = 8, 8, 2
MANY = 256  # episodes that several ranks play
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
    from .measure import Way, machine, race, same, table

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
        "ranks": rank_rollouts(options.ranks, options.repeats) if options.ranks else {},
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


# several ranks


def rank_rollouts(counts: Sequence[int], repeats: int) -> dict[str, dict[str, float]]:
    """{"RANKS": seconds, calls_per_second, cpu_ms_per_call (of all ranks), cpu_ms_of_rank_0},
    medians over `repeats` launches of each, in turns. Raises `RunError` if one played other
    episodes."""
    laps: dict[int, list[dict[str, Any]]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            laps[count].append(_launch(count, MANY))
    first = laps[counts[0]][0]["played"]
    for count, own in laps.items():
        if any(lap["played"] != first for lap in own):
            raise RunError(f"bench rollout: {count} ranks played other episodes; no numbers")
    columns = ("seconds", "calls_per_second", "cpu_ms_per_call", "cpu_ms_of_rank_0")
    return {
        str(count): {name: statistics.median(lap[name] for lap in own) for name in columns}
        for count, own in laps.items()
    }


def _launch(count: int, episodes: int) -> dict[str, Any]:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    done = subprocess.run(
        [*argv, str(count), "-m", "marlora.trainers.bench.rollout", str(episodes)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise RunError(f"bench rollout: {count} ranks failed; no numbers\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _runner() -> EpisodeRunner:
    engine = Sleepy(MEDIAN["tiny"])
    speakers = {name: EngineCompleter(engine, engine.tokens, name) for name in AGENTS}
    return EpisodeRunner(Chain(list(AGENTS)), speakers, sampling=Sampling(seed=0))


def _plan(label: str, tasks: int) -> list[EpisodeRequest]:
    return episode_requests([Task(str(k), f"task {k}") for k in range(tasks)], label=label)


async def _play_on_ranks(
    runner: EpisodeRunner, players: RankPlayers, plan: Sequence[EpisodeRequest], store: Store
) -> list[Episode]:
    episodes = []
    slots = asyncio.Semaphore(runner.limits.concurrency)
    spread = functools.partial(players.play, SAMPLED)
    async for episode in runner.collect(plan, TeamState(), slots, spread):
        store.extend([episode], flush=False, lines=players.lines_of([episode]))
        episodes.append(episode)
    store.flush()
    return episodes


async def _publish(versions: Mapping[str, str]) -> None:
    """The base alone is asked: there is nothing to publish."""


def _digest(episodes: Sequence[Episode]) -> str:
    rows = sorted((e.id, e.seed, [(t.text, t.logprobs) for t in e.turns]) for e in episodes)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def main(many: int) -> None:
    """One rank of a launch that plays so many episodes; rank 0 prints what was measured as
    JSON."""
    ranks, background, runner = Ranks(), BackgroundLoop(), _runner()
    if not ranks.main:
        service = PlayerService(ranks, background, runner, _publish)
        _, cpu = _measured(ranks, lambda: None)
        service.close()
    else:
        players = RankPlayers(ranks, range(1, ranks.size), background, Ledger(), print)
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:

            def play(plan: Sequence[EpisodeRequest]) -> list[Episode]:
                return background.run(_play_on_ranks(runner, players, plan, store))

            play(_plan("warm", 16))
            start = time.perf_counter()
            episodes, cpu = _measured(ranks, lambda: play(_plan("bench", many)))
            seconds = time.perf_counter() - start
        calls = many * len(AGENTS)
        found = {
            "seconds": seconds,
            "calls_per_second": calls / seconds,
            "cpu_ms_per_call": 1000 * sum(cpu) / calls,
            "cpu_ms_of_rank_0": 1000 * cpu[0] / calls,
            "played": _digest(episodes),
        }
        print(json.dumps(found))
        players.close()
    background.close()


def _measured(ranks: Ranks, work: Callable[[], T]) -> tuple[T, list[float]]:
    """What `work` gives on this rank, and every rank's processor seconds until all are done."""
    ranks.barrier()
    before = time.process_time()
    result = work()
    ranks.barrier()
    return result, ranks.gather(time.process_time() - before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
