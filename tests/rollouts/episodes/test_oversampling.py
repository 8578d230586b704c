"""Over-sampling: a group is complete when enough of it has ended, and every drop is on record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.transcript import Call
from marlora.agents.types import Completion, Task, Usage
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.episodes.oversampling import CancelledEpisode, drop_statistics, first_finished
from marlora.rollouts.episodes.runner import (
    EpisodeLimits,
    EpisodeRequest,
    EpisodeRunner,
    episode_requests,
)
from marlora.rollouts.types import Episode

TASKS = [Task("a", "a"), Task("b", "b")]


class Gated:
    """A speaker whose replies wait until they are let go: `open[agent, sample]`."""

    def __init__(self, plan: list[EpisodeRequest]) -> None:
        self.open = {(agent, job.id): asyncio.Event() for agent in ("one", "two") for job in plan}
        self.asked: list[tuple[str, str]] = []
        self.cancelled: list[tuple[str, str]] = []

    def speaker(self, agent: str, who: Callable[[], str]) -> Callable[[Call, str], object]:
        async def speak(call: Call, version: str) -> list[Completion]:
            key = (agent, who())
            self.asked.append(key)
            try:
                await self.open[key].wait()
            except asyncio.CancelledError:
                self.cancelled.append(key)
                raise
            if key[1] == "t/b/0" and agent == "two":
                raise ValueError("it fails")
            return [Completion("x" * 3, (1,), (7,) * 3, (0.0,) * 3, "stop", agent, version)]

        return speak


def current() -> str:
    """The job that the running task plays."""
    task = asyncio.current_task()
    assert task is not None
    return task.get_name()


async def collected(
    plan: list[EpisodeRequest],
    order: list[tuple[str, str]],
    wanted: dict[str, int],
    concurrency: int = 64,
) -> tuple[list[Episode], list[CancelledEpisode], Gated]:
    gated, dropped, found = Gated(plan), list[CancelledEpisode](), list[Episode]()
    speakers = {name: gated.speaker(name, current) for name in ("one", "two")}
    rollouts = EpisodeRunner(
        Chain(["one", "two"]), speakers, limits=EpisodeLimits(concurrency=concurrency)
    )  # type: ignore[arg-type]

    async def let_go() -> None:
        for key in order:
            gated.open[key].set()
            for _ in range(40):  # until everything that follows has happened
                await asyncio.sleep(0)

    letting = asyncio.create_task(let_go())
    async for episode in first_finished(rollouts, plan, None, wanted, dropped):
        found.append(episode)
    await letting
    return found, dropped, gated


def test_a_group_ends_with_the_last_one_that_is_wanted():
    """Of three episodes of each task two are wanted; a's third has said one turn by then, b's first
    fails, which is no end of it."""
    plan = episode_requests(TASKS, label="t", num_generations=3)
    one = [("one", job.id) for job in plan if job.id != "t/b/2"]
    order = [
        *one,
        ("two", "t/a/2"),
        ("two", "t/a/0"),
        ("two", "t/b/0"),
        ("two", "t/b/1"),
        ("one", "t/b/2"),
        ("two", "t/b/2"),
    ]
    found, dropped, gated = asyncio.run(collected(plan, order, {"t/a": 2, "t/b": 2}))
    assert [episode.id for episode in found] == ["t/a/2", "t/a/0", "t/b/0", "t/b/1", "t/b/2"]
    assert [episode.error is None for episode in found] == [True, True, False, True, True]
    assert [(d.id, d.turns, d.tokens, d.seconds > 0) for d in dropped] == [("t/a/1", 1, 3, True)]
    assert gated.cancelled == [("two", "t/a/1")]  # the request itself is cancelled


def test_what_has_not_begun_is_dropped_too():
    plan = episode_requests(TASKS[:1], label="t", num_generations=3)
    order = [("one", "t/a/0"), ("two", "t/a/0")]
    found, dropped, _ = asyncio.run(collected(plan, order, {"t/a": 1}, concurrency=1))
    assert [episode.id for episode in found] == ["t/a/0"]
    # The room was free for a moment before the group was seen to be complete, so the second may
    # have begun; the third has not.
    assert (
        [d.id for d in dropped] == ["t/a/1", "t/a/2"]
        and dropped[1].seconds == 0
        and all(d.tokens == 0 for d in dropped)
    )


def test_a_group_that_is_complete_already_plays_nothing():
    plan = episode_requests(TASKS[:1], label="t", num_generations=2)
    found, dropped, gated = asyncio.run(collected(plan, [], {"t/a": 0}))
    assert (found, dropped, gated.asked) == ([], [], [])


def test_an_engine_that_is_gone_ends_it_all():
    plan = episode_requests(TASKS[:1], label="t", num_generations=2)
    cancelled = []

    async def gone(call: Call, version: str) -> list[Completion]:
        if current() == "t/a/0":
            raise EngineError("gone")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(current())
            raise
        return []

    async def run() -> None:
        rollouts = EpisodeRunner(Chain(["one"]), {"one": gone})
        async for _ in first_finished(rollouts, plan, None, {"t/a": 1}, []):
            pass

    with pytest.raises(EngineError, match="gone"):
        asyncio.run(run())
    assert cancelled == ["t/a/1"]


def test_lengths_of_kept_and_dropped_stand_side_by_side():
    def episode(tokens: int) -> Episode:
        return Episode(
            id="x",
            group="x",
            task=TASKS[0],
            seed=0,
            usage={"one": Usage(1, 5, tokens, 0.1), "two": Usage(1, 5, 1, 0.1)},
        )

    found = drop_statistics(
        [episode(9), episode(19)],
        [CancelledEpisode("a", 2, 30, 1.0), CancelledEpisode("b", 0, 0, 0.0)],
    )
    assert found == {
        "dropped": 2,
        "not_begun": 1,
        "dropped_tokens": 30,
        "mean_tokens_dropped": 30.0,
        "mean_tokens_kept": 15.0,
        "mean_turns_dropped": 2.0,
    }
