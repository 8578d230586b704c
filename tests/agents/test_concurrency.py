"""Coroutines awaited together."""

from __future__ import annotations

import asyncio

import pytest

from marlora.agents.concurrency import gather
from marlora.agents.types import SettingError
from tests.agents.teams import run, slow_team


def test_gather_keeps_order() -> None:
    async def value(k: int) -> int:
        for _ in range(5 - k):
            await asyncio.sleep(0)
        return k

    assert run(lambda: gather(value(k) for k in range(5))) == [0, 1, 2, 3, 4]
    assert run(lambda: gather([])) == []


def test_gather_cancels_siblings_and_raises_the_first_error() -> None:
    cancelled: list[int] = []

    async def work(k: int) -> int:
        try:
            if k == 1:
                await asyncio.sleep(0)
                raise ValueError("one broke")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(k)
            raise
        return k

    with pytest.raises(ValueError, match="one broke"):
        run(lambda: gather(work(k) for k in range(3)))
    assert cancelled == [0, 2]


def test_gather_cancels_what_began_if_the_iterable_fails_or_it_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    async def play() -> None:
        (outer,) = [asyncio.ensure_future(gather(work() for _ in range(2)))]
        for _ in range(3):
            await asyncio.sleep(0)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert ended == ["ended", "ended"]
        team, _ = slow_team("ab", [50, 50])
        with pytest.raises(SettingError, match="no such agent"):
            await gather(team[name].reply("x") for name in ("a", "bb"))
        assert len(asyncio.all_tasks()) == 1

    run(play)
