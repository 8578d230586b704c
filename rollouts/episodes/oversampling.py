"""Over-sampling: more episodes than needed are started, and once a group has enough, the rest are
cancelled.

A step is as slow as its slowest episode. Over-sampling cuts that tail and has a price: the episodes
are no longer a fair sample, since the long ones are cancelled. So every cancelled episode is
recorded with its length, beside the lengths of the finished ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.state import TeamState
from ...agents.transcript import Call
from ...agents.types import Completion
from ..types import Episode
from .completers import Completer
from .runner import EpisodeRequest, EpisodeRunner


@dataclass(frozen=True)
class CancelledEpisode:
    """An episode that was cancelled. `turns`, `tokens`: sampled in turns that had ended; `seconds`:
    since it began (0: not begun)."""

    id: str
    turns: int
    tokens: int
    seconds: float


class _TokenCounter:
    """A completer that counts the turns and tokens sampled in one episode."""

    def __init__(self, completer: Completer, count: Counter[str]) -> None:
        self.completer, self.count = completer, count

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        completions = await self.completer(call, version)
        self.count["turns"] += 1
        self.count["tokens"] += sum(len(completion.token_ids) for completion in completions)
        return completions

    @property
    def outside(self) -> bool:
        return self.completer.outside

    def most_prompt_tokens(self, call: Call) -> int:
        return self.completer.most_prompt_tokens(call)


async def first_finished(
    runner: EpisodeRunner,
    plan: Sequence[EpisodeRequest],
    state: TeamState | Callable[[], TeamState] | None,
    needed: Mapping[str, int],
    dropped: list[CancelledEpisode],
    slots: asyncio.Semaphore | None = None,
) -> AsyncIterator[Episode]:
    """Like `EpisodeRunner.collect`, but the requests of a group are cancelled as soon as
    `needed[group]` of it have ended without an error.

    Failed episodes are yielded and do not count. Cancelled ones are appended to `dropped`.
    """
    slots = slots or asyncio.Semaphore(runner.limits.concurrency)
    counts: dict[str, Counter[str]] = {request.id: Counter() for request in plan}
    begun: dict[str, float] = {}

    async def one(request: EpisodeRequest) -> list[Episode]:
        completers = {
            policy: _TokenCounter(completer, counts[request.id])
            for policy, completer in runner.completers.items()
        }
        counting = dataclasses.replace(runner, completers=completers)
        async with slots:
            begun[request.id] = time.perf_counter()
            return [episode async for episode in counting.collect([request], state)]

    left = Counter({group: needed[group] for group in {request.group for request in plan}})
    tasks = {
        asyncio.create_task(one(request), name=request.id): request
        for request in plan
        if left[request.group] > 0
    }
    open_ = set(tasks)
    try:
        while open_:
            done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
            # Of several that ended at once the first of the plan count first.
            for task in sorted(done, key=list(tasks).index):
                request = tasks[task]
                episodes = task.result()  # an `EngineError` or `SettingError` concerns all
                if left[request.group] <= 0:  # it ended beside the last one that was needed
                    dropped.append(_drop(request, counts[request.id], begun))
                    continue
                left[request.group] -= episodes[-1].error is None
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


def _drop(
    request: EpisodeRequest, count: Counter[str], begun: Mapping[str, float]
) -> CancelledEpisode:
    seconds = time.perf_counter() - begun[request.id] if request.id in begun else 0.0
    return CancelledEpisode(request.id, count["turns"], count["tokens"], seconds)


def drop_statistics(
    finished: Sequence[Episode], dropped: Sequence[CancelledEpisode]
) -> dict[str, float | int]:
    """Metrics of a step: how many episodes were cancelled, their cost, and their length beside
    that of the finished ones."""
    lengths = [
        sum(usage.sampled_tokens for usage in episode.usage.values()) for episode in finished
    ]
    started = [d for d in dropped if d.seconds]
    return {
        "dropped": len(dropped),
        "not_begun": len(dropped) - len(started),
        "dropped_tokens": sum(d.tokens for d in dropped),
        "mean_tokens_dropped": sum(d.tokens for d in started) / max(len(started), 1),
        "mean_tokens_kept": sum(lengths) / max(len(lengths), 1),
        "mean_turns_dropped": sum(d.turns for d in started) / max(len(started), 1),
    }
