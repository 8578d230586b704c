"""`marlora bench fleet`: ten thousand episodes in flight on a simulated fleet of 64 replicas.

A replica computes nothing: it answers after a log-normal time. Now and then one goes down, and
every call it holds goes to another; one reply in two hundred is cut off, and one reward in two
hundred raises. What is measured is ours: that every episode is stored once, with all its turns,
and every call counted once; processor time of a call; memory of an episode in flight, and
whether it grows; and how much later than its answer a call returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....agents.patterns.chain import Chain
from ....agents.types import Completion, Sampling, Task
from ....rollouts.engines.base import ModelRef
from ....rollouts.engines.scripted import ScriptedEngine
from ....rollouts.episodes.completers import EngineCompleter
from ....rollouts.episodes.runner import EpisodeLimits, EpisodeRunner, episode_requests
from ....rollouts.episodes.store import Store
from ....rollouts.ledger import Ledger
from ....rollouts.types import Episode
from ...errors import RunError
from ..measure import Options, machine, memory, table

AGENTS = ("planner", "solver", "reviewer")
REPLY = 32  # tokens
SIGMA = 1.0  # of the logarithm of a latency
RARE = 200  # one reply in so many is cut off, and one reward in so many raises
BATCH = 256  # episodes that are stored together


@dataclass(frozen=True)
class Load:
    """Replicas, episodes in flight, episodes in all, and seconds of the median reply."""

    replicas: int
    in_flight: int
    episodes: int
    median: float


LOADS = {"tiny": Load(8, 100, 300, 0.02)}
USUAL = Load(64, 10_000, 25_000, 30.0)  # about twenty minutes
LONGEST = 12.0  # medians: a reply has most tokens, so it has a longest time


class ReplicaDown(Exception):
    """A replica has gone down while it held a call."""


@dataclass
class Replica:
    """Calls in one replica; none comes while it is `down`."""

    calls: set[asyncio.Future[None]] = field(default_factory=set)
    down: bool = False


class Fleet(ScriptedEngine):
    """Replicas that answer after log-normal times. `late`: seconds between an answer and the return
    of its call; `retried`: calls that a replica took with it; `answered`: calls."""

    def __init__(self, load: Load, seed: int = 0) -> None:
        super().__init__(lambda prompt, ref, sampling, k: "")
        self.load, self.rng = load, random.Random(seed)
        self.replicas = [Replica() for _ in range(load.replicas)]
        self.late: list[float] = []
        self.answered = self.retried = self.outages = 0

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        while True:
            up = [each for each in self.replicas if not each.down]
            try:
                await self._held(min(up, key=lambda each: len(each.calls)))
                break
            except ReplicaDown:
                self.retried += 1
        self.answered += 1
        cut = self.rng.randrange(RARE) == 0
        own = tuple(self.rng.randrange(5, 261) for _ in range(REPLY // 2 if cut else REPLY))
        reason = "length" if cut else "stop"
        return [
            Completion(
                text=self.tokens.decode(own),
                prompt_ids=tuple(ids),
                token_ids=own,
                logprobs=(-1.0,) * len(own),
                finish_reason=reason,
                policy=ref.policy,
                version=ref.version,
            )
        ]

    async def _held(self, replica: Replica) -> None:
        """Wait for this replica's answer. Raises `ReplicaDown` if it goes down before."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        times = min(math.exp(self.rng.gauss(0.0, SIGMA)), LONGEST)  # the median
        due = loop.time() + times * self.load.median
        timer = loop.call_at(due, _set, answer)
        replica.calls.add(answer)
        try:
            await answer
            self.late.append(loop.time() - due)
        finally:
            timer.cancel()
            replica.calls.discard(answer)

    async def fail_now_and_then(self) -> None:
        """Take a replica down for as long as a reply takes, one after the other."""
        while True:
            await asyncio.sleep(self.load.median)
            replica = self.rng.choice(self.replicas)
            self.outages += 1
            replica.down = True
            for call in list(replica.calls):
                if not call.done():
                    call.set_exception(ReplicaDown())
            await asyncio.sleep(self.load.median)
            replica.down = False


def _set(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_result(None)


def judged(task: Task, episode: Episode) -> float:
    """A reward that raises for one episode in `RARE`."""
    if int(episode.task.id) % RARE == 0:
        raise ValueError("no reward for this one")
    return float(len(str(episode.output)) % 2)


@dataclass
class Watch:
    """What is in flight, and the memory of this process, every second or so."""

    begun: int = 0
    ended: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, in flight, bytes

    async def look(self, every: float) -> None:
        start = time.monotonic()
        while True:
            now = time.monotonic() - start
            self.samples.append((now, self.begun - self.ended, memory("VmRSS")))
            await asyncio.sleep(every)


def fleet(options: Options) -> dict[str, Any]:
    """Play all episodes once. Raises `RunError` if one was lost or counted twice."""
    load = LOADS.get(options.size, USUAL)
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        found = asyncio.run(play(load, Path(scratch)))
    rows = [
        [
            f"{load.episodes:,}",
            f"{found['calls']:,}",
            f"{found['ms_per_call']:.2f}",
            f"{found['bytes_per_episode_in_flight'] / 1024:.1f}",
            f"{found['memory_last_over_first']:.2f}",
            *(f"{1000 * found['late'][p]:.0f}" for p in ("p50", "p99", "largest")),
        ]
    ]
    columns = [
        "episodes",
        "calls",
        "ms of CPU a call",
        "KiB an episode in flight",
        "memory, last over first quarter",
        "late by, p50, ms",
        "p99",
        "largest",
    ]
    title = f"fleet: {load.replicas} replicas, {load.in_flight:,} episodes in flight"
    return {"suite": "fleet", **machine(), **vars(load), **found, **table(title, columns, rows)}


async def play(load: Load, folder: Path) -> dict[str, Any]:
    """Play the load into a store in this folder, and compare what is stored with what was asked."""
    engine, watch, ledger = Fleet(load), Watch(), Ledger()
    speakers = {name: EngineCompleter(engine, engine.tokens, name) for name in AGENTS}
    runner = EpisodeRunner(
        Chain(list(AGENTS)),
        speakers,
        rewards=[judged],
        limits=EpisodeLimits(concurrency=load.in_flight, episode_timeout=math.inf),
        sampling=Sampling(seed=0),
        ledger=ledger,
    )
    tasks = [Task(str(k), f"task {k}") for k in range(load.episodes)]
    plan = episode_requests(tasks, label="load")
    begun, resting = time.monotonic(), memory("VmRSS")
    process = time.process_time()
    watch.begun = load.in_flight
    helpers = [
        asyncio.create_task(engine.fail_now_and_then()),
        asyncio.create_task(watch.look(max(load.median / 30, 0.01))),
    ]
    with Store(folder / "episodes") as store:
        batch: list[Episode] = []

        def keep() -> None:
            store.extend(batch)
            for each in batch:
                ledger.stored(each)
            batch.clear()

        async for episode in runner.collect(plan):
            watch.ended += 1
            watch.begun = min(load.episodes, watch.ended + load.in_flight)
            batch.append(episode)
            if len(batch) >= BATCH:
                keep()
        keep()
        spent = time.process_time() - process
        for helper in helpers:
            helper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await helper
        check(store, load, engine, ledger)
    late = sorted(engine.late)
    return {
        "calls": engine.answered,
        "retried": engine.retried,
        "outages": engine.outages,
        "wall_s": time.monotonic() - begun,
        "ms_per_call": 1000 * spent / engine.answered,
        "late": {
            "p50": statistics.median(late),
            "p99": late[int(0.99 * len(late))],
            "largest": late[-1],
        },
        **memory_of(watch.samples, resting, load),
    }


def check(store: Store, load: Load, engine: Fleet, ledger: Ledger) -> None:
    """Raise `RunError` unless every episode is stored once with every turn, and the calls of all,
    in the store and in the ledger, are the fleet's."""
    ids: list[str] = []
    calls = unscorable = 0
    for line in store.lines():
        ids.append(line["id"])
        calls += sum(each["calls"] for each in line["usage"])
        unscorable += any(reward["value"] is None for reward in line["rewards"])
        if line["error"] or len(line["turns"]) != len(AGENTS):
            raise RunError(f"bench fleet: episode {line['id']} has not all its turns")
    wanted = {f"load/{k}/0" for k in range(load.episodes)}
    if len(ids) != len(set(ids)) or set(ids) != wanted:
        missing, twice = wanted - set(ids), len(ids) - len(set(ids))
        raise RunError(f"bench fleet: {len(missing)} episodes are lost, {twice} stored twice")
    metered = sum(row["calls"] for row in ledger.rows()["train"].values())
    if not calls == metered == engine.answered == len(wanted) * len(AGENTS):
        raise RunError(
            f"bench fleet: {calls} calls on record, {metered} in the ledger, {engine.answered}"
            " answered"
        )
    if unscorable != math.ceil(load.episodes / RARE):
        raise RunError(f"bench fleet: {unscorable} episodes without a reward")


def memory_of(
    samples: Sequence[tuple[float, int, int]], resting: int, load: Load
) -> dict[str, Any]:
    """Bytes of an episode in flight, from the samples with all in flight, above the memory at rest
    with the plan; and their last quarter over their first."""
    full = [size for _, in_flight, size in samples if in_flight >= load.in_flight]
    if len(full) < 4:
        raise RunError("bench fleet: it was over before memory could be looked at; more episodes")
    quarter = len(full) // 4
    first, last = statistics.mean(full[1 : quarter + 1]), statistics.mean(full[-quarter:])
    return {
        "bytes_at_rest": resting,
        "bytes_per_episode_in_flight": (first - resting) / load.in_flight,
        "memory_last_over_first": last / first,
    }
