"""Teams of functions for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from marlora.agents.chat import Services
from marlora.agents.team import Team
from marlora.agents.transcript import Call, Transcript
from marlora.agents.types import AgentSpec, Completion

T = TypeVar("T")


def run(play: Callable[[], Awaitable[T]]) -> T:
    async def inside() -> T:
        return await play()

    return asyncio.run(inside())


def slow_team(names: str, waits: Sequence[int], **settings: Any) -> tuple[Team, list[Call]]:
    """A team whose k-th call is answered `k` after waits[k] turns of the event loop. Also: the
    calls, as they arrive."""
    calls: list[Call] = []

    async def ask(call: Call) -> list[Completion]:
        calls.append(call)
        for _ in range(waits[call.index]):
            await asyncio.sleep(0)
        return [Completion(f"{call.index}.{k}") for k in range(call.n)]

    specs = [AgentSpec(name) for name in names]
    return Team(specs, Services(ask), Transcript(**settings)), calls
