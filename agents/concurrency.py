"""Concurrent coroutines with results in a fixed order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable

from .types import T


async def gather(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """Await all at once, results in the order given. If one fails, the others are cancelled and its
    error is raised."""
    tasks: list[asyncio.Future[T]] = []
    try:
        for awaitable in awaitables:
            tasks.append(asyncio.ensure_future(awaitable))
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
