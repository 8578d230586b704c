"""Many programs at once: none waits for its connection, and none for another's answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import aiohttp
import pytest

from marlora.agents.chat import Services
from marlora.agents.concurrency import gather
from marlora.agents.team import Team
from marlora.agents.types import AgentSpec, Completion, Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.gateway.server import GatewayServer

CALLERS = 512


class Together(ScriptedEngine):
    """Answers no call before all callers have asked."""

    def __init__(self, callers: int) -> None:
        super().__init__(lambda prompt, ref, sampling, k: "ok")
        self.all = asyncio.Barrier(callers)

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        await self.all.wait()
        return await super().generate(ids, ref, sampling, n, replica=replica)


def team_on(engine: ScriptedEngine) -> Team:
    speaker = EngineCompleter(engine, engine.tokens, "solver")
    return Team([AgentSpec("solver")], Services(lambda call: speaker(call, "")))


@pytest.mark.timeout(120)
def test_all_are_in_flight_at_once() -> None:
    """An answer comes only when the last one has asked: with any bound on connections or calls
    below their number this would wait for ever."""

    async def go() -> int:
        engine, gateway = Together(CALLERS), GatewayServer()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:

            async def ask(number: int) -> str:
                async with gateway.open_session(team_on(engine)) as session:
                    body = {
                        "model": "solver",
                        "messages": [{"role": "user", "content": f"caller {number}"}],
                    }
                    head = {"Authorization": f"Bearer {session.key}"}
                    url = f"{session.base_url}/chat/completions"
                    async with client.post(url, json=body, headers=head) as reply:
                        assert reply.status == 200, await reply.text()
                        answer = await reply.json()
                    return str(answer["choices"][0]["message"]["content"])

            texts = await gather(ask(number) for number in range(CALLERS))
        assert texts == ["ok"] * CALLERS
        return len(engine.calls)

    assert asyncio.run(go()) == CALLERS


def test_a_busy_gateway_has_room_for_their_connections() -> None:
    """While the event loop is busy nothing is accepted, so the listening queue holds all: beyond it
    the kernel drops a connection's first packet, which is sent again a second later."""

    async def go() -> None:
        gateway = GatewayServer()
        async with gateway.open_session(team_on(ScriptedEngine(lambda *a: "ok"))) as session:
            address = urlsplit(session.base_url)
            with contextlib.ExitStack() as open_:
                for _ in range(CALLERS):  # this blocks the loop
                    where = (address.hostname, address.port)
                    open_.enter_context(socket.create_connection(where, timeout=0.9))

    asyncio.run(go())
