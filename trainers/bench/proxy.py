"""`marlora bench proxy`: what the gateway costs. The same calls, direct and over HTTP, to
an engine that answers after a fixed time and computes nothing. Client and server share one
process and one core, so the price shown is that of both.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
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
    1: 10,
    64: 4,
    512: 2,
}  # calls that each caller makes, one after the other, by the number of callers
REPLY, PROMPT = 64, 400  # tokens
LATENCY = 0.25  # seconds until the engine answers: about 64 tokens at 256 tokens/s
SPEC = AgentSpec("solver", sampling=Sampling(max_tokens=REPLY, seed=0))

Ask = Callable[[Team, Sequence[str]], Awaitable[None]]


def proxy(options: Options) -> dict[str, Any]:
    """Tokens per second of both ways at 1, 64 and 512 calls at once, and the processor time that
    the gateway adds to a call."""
    results = [asyncio.run(_compare(callers, options.repeats)) for callers in CALLS]
    rows = [
        [
            str(r["concurrent"]),
            f"{r['direct']['tokens_per_s']:,.0f}",
            f"{r['proxy']['tokens_per_s']:,.0f}",
            f"{r['proxy_over_direct']:.2f}",
            f"{r['direct']['ms_per_call']:.2f}",
            f"{r['proxy']['ms_per_call']:.2f}",
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
    """Both ways in turns, after one round that does not count. Raises `RunError` if the turns on
    record differ."""
    timings: dict[str, list[tuple[float, float]]] = {"direct": [], "proxy": []}
    for number in range(repeats + 1):
        records = {}
        for name, way in (("direct", _direct), ("proxy", _through)):
            seconds, process, turns = await way(callers)
            records[name] = sorted((t.messages[0].content, t.completion) for t in turns)
            if number:
                timings[name].append((seconds, process))
        if records["direct"] != records["proxy"]:
            raise RunError(
                "bench proxy: the gateway's turns are not those of direct calls; no numbers given"
            )
    calls = callers * CALLS[callers]
    report: dict[str, Any] = {"concurrent": callers, "calls": calls}
    for name, times in timings.items():
        wall, process = (
            statistics.median(w for w, _ in times),
            statistics.median(p for _, p in times),
        )
        report[name] = {"tokens_per_s": calls * REPLY / wall, "ms_per_call": 1000 * process / calls}
    return report | {
        "proxy_over_direct": report["proxy"]["tokens_per_s"] / report["direct"]["tokens_per_s"]
    }


def _team() -> Team:
    engine = ScriptedEngine(
        lambda prompt, ref, sampling, k: "x" * REPLY, latency=LATENCY
    )  # cut off, so all are of one length
    speaker = EngineCompleter(engine, engine.tokens, "solver")
    return Team([SPEC], Services(lambda call: speaker(call, "")))


async def _measured(callers: int, ask: Ask) -> tuple[float, float, list[Turn]]:
    """Each caller is an episode with a team of its own, and makes its calls one after the other."""
    teams = [_team() for _ in range(callers)]
    start, process = time.perf_counter(), time.process_time()
    await gather(
        ask(team, [f"{name} {n} ".ljust(PROMPT, "y") for n in range(CALLS[callers])])
        for name, team in enumerate(teams)
    )
    return (
        time.perf_counter() - start,
        time.process_time() - process,
        [turn for team in teams for turn in team.turns],
    )


async def _direct(callers: int) -> tuple[float, float, list[Turn]]:
    async def ask(team: Team, texts: Sequence[str]) -> None:
        for text in texts:
            await team["solver"].answer([Message("user", text)])

    return await _measured(callers, ask)


async def _through(callers: int) -> tuple[float, float, list[Turn]]:
    gateway = GatewayServer()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(team: Team, texts: Sequence[str]) -> None:
            async with gateway.open_session(team) as visit:
                for text in texts:
                    body = {"model": "solver", "messages": [{"role": "user", "content": text}]}
                    head = {"Authorization": f"Bearer {visit.key}"}
                    async with session.post(
                        f"{visit.base_url}/chat/completions", json=body, headers=head
                    ) as reply:
                        if reply.status != 200:
                            raise RunError(f"bench proxy: {reply.status} {await reply.text()}")
                        await reply.json()

        return await _measured(callers, ask)
