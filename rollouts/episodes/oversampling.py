"""More episodes than are needed begin, and once a group has enough the stragglers are cancelled.

A step is as slow as its slowest episode. Over-sampling cuts that tail and has a price: what is kept
is no longer a fair sample, since the long ones are those that are dropped. So every drop is on
record with its length, beside the lengths of what was kept.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.types import Call, Completion
from ..engines.base import TeamVersion
from ..types import Episode
from .completers import Completer
from .runner import EpisodeRequest, EpisodeRunner


@dataclass(frozen=True)
class CancelledEpisode:
    """An episode that was cancelled. `turns`, `tokens`: sampled in turns that had ended; `seconds`:
    since it began (0: it had not)."""

    id: str
    turns: int
    tokens: int
    seconds: float


class _TokenCounter:
    """A speaker that counts what an episode has sampled."""

    def __init__(self, speaker: Completer, count: Counter[str]) -> None:
        self.speaker, self.count = speaker, count

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        found = await self.speaker(call, version)
        self.count["turns"] += 1
        self.count["tokens"] += sum(len(completion.token_ids) for completion in found)
        return found


async def first_finished(
    rollouts: EpisodeRunner,
    plan: Sequence[EpisodeRequest],
    version: TeamVersion | Callable[[], TeamVersion] | None,
    wanted: Mapping[str, int],
    dropped: list[CancelledEpisode],
    room: asyncio.Semaphore | None = None,
) -> AsyncIterator[Episode]:
    """Like `Rollouts.collect`, but the jobs of a group are cancelled as soon as `wanted[group]` of
    it have ended without an error.

    Failed episodes are given out and do not count. Cancelled ones are appended to `dropped`.
    """
    room = room or asyncio.Semaphore(rollouts.limits.concurrency)
    counts: dict[str, Counter[str]] = {job.id: Counter() for job in plan}
    begun: dict[str, float] = {}

    async def one(job: EpisodeRequest) -> list[Episode]:
        speakers = {
            policy: _TokenCounter(speaker, counts[job.id])
            for policy, speaker in rollouts.speakers.items()
        }
        mine = dataclasses.replace(rollouts, speakers=speakers)
        async with room:
            begun[job.id] = time.perf_counter()
            return [episode async for episode in mine.collect([job], version)]

    left = Counter({group: wanted[group] for group in {job.group for job in plan}})
    tasks = {asyncio.create_task(one(job), name=job.id): job for job in plan if left[job.group] > 0}
    open_ = set(tasks)
    try:
        while open_:
            done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
            # Of several that ended at once the first of the plan count first.
            for task in sorted(done, key=list(tasks).index):
                job = tasks[task]
                episodes = task.result()  # an `EngineError` or `SettingError` concerns all
                if left[job.group] <= 0:  # it ended beside the last one that was wanted
                    dropped.append(_drop(job, counts[job.id], begun))
                    continue
                left[job.group] -= episodes[-1].error is None
                for episode in episodes:
                    yield episode
            late = [task for task in tasks if task in open_ and left[tasks[task].group] <= 0]
            await _cancel(late)
            dropped += [_drop(tasks[task], counts[tasks[task].id], begun) for task in late]
            open_ -= set(late)
    finally:
        await _cancel(list(open_))


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _drop(job: EpisodeRequest, count: Counter[str], begun: Mapping[str, float]) -> CancelledEpisode:
    seconds = time.perf_counter() - begun[job.id] if job.id in begun else 0.0
    return CancelledEpisode(job.id, count["turns"], count["tokens"], seconds)


def drop_statistics(
    kept: Sequence[Episode], dropped: Sequence[CancelledEpisode]
) -> dict[str, float | int]:
    """For the step's metrics: how many were dropped, what they had cost, and how long they were
    beside those that were kept."""
    lengths = [sum(usage.sampled_tokens for usage in episode.usage.values()) for episode in kept]
    started = [d for d in dropped if d.seconds]
    return {
        "dropped": len(dropped),
        "not_begun": len(dropped) - len(started),
        "dropped_tokens": sum(d.tokens for d in dropped),
        "mean_tokens_dropped": sum(d.tokens for d in started) / max(len(started), 1),
        "mean_tokens_kept": sum(lengths) / max(len(lengths), 1),
        "mean_turns_dropped": sum(d.turns for d in started) / max(len(started), 1),
    }
