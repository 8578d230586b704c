"""`marlora bench proxy`: what the gateway costs. The same calls, direct and over HTTP, to an engine
that answers after a fixed time and computes nothing; and the client's calls to a server that sends
one reply over and over. All share one process and one core, so that the gateway's own price is what
is left of its way without the other two.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from ...agents.chat import Services
from ...agents.concurrency import gather
from ...agents.team import Team
from ...agents.types import AgentSpec, Message, Sampling, Turn
from ...rollouts.engines.scripted import ScriptedEngine
from ...rollouts.episodes.completers import EngineCompleter
from ...rollouts.gateway.server import GatewayServer
from ..errors import RunError
from .measure import Options, machine, table

CALLS = {
    1: 32,
    64: 8,
    512: 4,
}  # calls that each caller makes, one after the other, by the number of callers
REPLY, PROMPT = 64, 400  # tokens
LATENCY = 0.25  # seconds until the engine answers: about 64 tokens at 256 tokens/s
SPEC = AgentSpec("solver", sampling=Sampling(max_tokens=REPLY, seed=0))
LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)

Ask = Callable[[Team, Sequence[str]], Awaitable[None]]
Way = Callable[[], contextlib.AbstractAsyncContextManager[Ask]]


@dataclass(frozen=True)
class Lap:
    """One way, once: wall and processor time in seconds, and the turns on record."""

    wall: float
    process: float
    turns: list[Turn]


def proxy(options: Options) -> dict[str, Any]:
    """Tokens per second at 1, 64 and 512 calls at once, and the processor time of a call: direct,
    through the gateway, of the client alone, and what is left of it for the gateway itself."""
    results = [asyncio.run(_compare(callers, options.repeats)) for callers in CALLS]
    rows = [
        [
            str(r["concurrent"]),
            *(f"{r[way]['tokens_per_s']:,.0f}" for way in ("direct", "proxy")),
            f"{r['proxy_over_direct']:.2f}",
            *(f"{r[way]['ms_per_call']:.2f}" for way in ("direct", "proxy", "client")),
            f"{r['gateway_ms_per_call']:.2f}",
        ]
        for r in results
    ]
    columns = [
        "calls at once",
        "direct, tokens/s",
        "through the gateway",
        "ratio",
        "direct, ms of CPU a call",
        "through the gateway",
        "client alone",
        "gateway itself",
    ]
    return {
        "suite": "proxy",
        "reply": REPLY,
        "prompt": PROMPT,
        "latency": LATENCY,
        **machine(),
        "results": results,
        **table(f"proxy: an engine that answers after {LATENCY} s", columns, rows),
    }


async def _compare(callers: int, repeats: int) -> dict[str, Any]:
    """All ways in turns, after one round that does not count. Raises `RunError` if the turns on
    record differ."""
    ways: dict[str, Way] = {"direct": _direct, "proxy": _through, "client": _client}
    rounds = [{name: await _measured(callers, way) for name, way in ways.items()}]
    rounds += [
        {name: await _measured(callers, way) for name, way in ways.items()} for _ in range(repeats)
    ]
    for laps in rounds:
        if _record(laps["direct"]) != _record(laps["proxy"]):
            raise RunError(
                "bench proxy: the gateway's turns are not those of direct calls; no numbers given"
            )
    del rounds[0]
    calls = callers * CALLS[callers]
    report: dict[str, Any] = {"concurrent": callers, "calls": calls}
    for name in ways:
        wall = statistics.median(laps[name].wall for laps in rounds)
        process = statistics.median(laps[name].process for laps in rounds)
        report[name] = {"tokens_per_s": calls * REPLY / wall, "ms_per_call": 1000 * process / calls}
    over = report["proxy"]["tokens_per_s"] / report["direct"]["tokens_per_s"]
    own = statistics.median(_own(laps) for laps in rounds)
    return report | {"proxy_over_direct": over, "gateway_ms_per_call": 1000 * own / calls}


def _own(laps: Mapping[str, Lap]) -> float:
    """Seconds of processor time of a round that are the gateway's."""
    return laps["proxy"].process - laps["client"].process - laps["direct"].process


def _record(lap: Lap) -> list[Any]:
    return sorted((turn.messages[0].content, turn.completion) for turn in lap.turns)


def _team() -> Team:
    engine = ScriptedEngine(
        lambda prompt, ref, sampling, k: "x" * REPLY, latency=LATENCY
    )  # cut off, so all are of one length
    speaker = EngineCompleter(engine, engine.tokens, "solver")
    return Team([SPEC], Services(lambda call: speaker(call, "")))


async def _measured(callers: int, way: Way) -> Lap:
    """Each caller is an episode with a team of its own, and makes its calls one after the other.
    Servers run and connections are open before: each has carried a call."""
    teams = [_team() for _ in range(callers)]
    texts = {
        team: [f"{name} {n} ".ljust(PROMPT, "y") for n in range(CALLS[callers])]
        for name, team in enumerate(teams)
    }
    async with way() as ask:
        await gather(ask(_team(), ["warm".ljust(PROMPT, "y")]) for _ in teams)
        start, process = time.perf_counter(), time.process_time()
        await gather(ask(team, texts[team]) for team in teams)
        wall, process = time.perf_counter() - start, time.process_time() - process
    return Lap(wall, process, [turn for team in teams for turn in team.turns])


@contextlib.asynccontextmanager
async def _direct() -> AsyncIterator[Ask]:
    async def ask(team: Team, texts: Sequence[str]) -> None:
        for text in texts:
            await team["solver"].answer([Message("user", text)])

    yield ask


@contextlib.asynccontextmanager
async def _http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        yield client


@contextlib.asynccontextmanager
async def _through() -> AsyncIterator[Ask]:
    gateway = GatewayServer()

    async def ask(team: Team, texts: Sequence[str]) -> None:
        async with gateway.open_session(team) as visit:
            for text in texts:
                await _post(client, f"{visit.base_url}/chat/completions", visit.key, text)

    # an episode that nobody plays keeps the server up
    async with gateway.open_session(_team()), _http() as client:
        yield ask


async def _post(client: aiohttp.ClientSession, url: str, key: str, text: str) -> bytes:
    """What a program does for a call: the reply, of which it has read the JSON."""
    body = {"model": "solver", "messages": [{"role": "user", "content": text}]}
    head = {"Authorization": f"Bearer {key}"}
    async with client.post(url, json=body, headers=head) as reply:
        if reply.status != 200:
            raise RunError(f"bench proxy: {reply.status} {await reply.text()}")
        await reply.json()
        return await reply.read()


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[Ask]:
    """The client's calls to a server that does next to nothing: it sends the gateway's reply to one
    call again and again."""
    gateway = GatewayServer()
    async with gateway.open_session(_team()) as visit, _http() as client:
        url = f"{visit.base_url}/chat/completions"
        reply, key, path = await _post(client, url, visit.key, "one"), visit.key, url

    async def ask(team: Team, texts: Sequence[str]) -> None:
        for text in texts:
            await _post(client, f"http://127.0.0.1:{port}/{path.split('/', 3)[3]}", key, text)

    async with _canned(reply) as port, _http() as client:
        yield ask


@contextlib.asynccontextmanager
async def _canned(body: bytes) -> AsyncIterator[int]:
    """The port of a server that sends this, `LATENCY` seconds after each request."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    reply = head.encode() + b"\r\n\r\n" + body

    async def accept(listener: socket.socket) -> None:
        async with asyncio.TaskGroup() as answers:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                answers.create_task(_answer(connection, reply))

    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(accept(listener))
        try:
            yield listener.getsockname()[1]
        finally:
            accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await accepting


async def _answer(connection: socket.socket, reply: bytes) -> None:
    """Send the reply to each request that has come whole, until the client closes."""
    loop, received = asyncio.get_running_loop(), b""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := await loop.sock_recv(connection, 1 << 16):
            received += data
            head, end, body = received.partition(b"\r\n\r\n")
            length = LENGTH.search(head)
            if end and length and len(body) == int(length[1]):
                received = b""
                await asyncio.sleep(LATENCY)
                await loop.sock_sendall(connection, reply)
