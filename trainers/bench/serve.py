"""`marlora bench serve`: what a vLLM server of ours gives with 0 to 8 adapters, with and without a
prefix it knows, and what its guard costs.

The requests of a wave go round the adapters, so that all of them decode side by side; 0 is the bare
base of the same server. A server without the guard is the same command line without `--middleware`;
it listens on loopback and ends with the measurement.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...agents.types import PolicySpec, Sampling
from ...rollouts.engines.base import Engine, ModelRef
from ...rollouts.engines.config import EngineConfig
from ...rollouts.engines.hardware import choose_dtype, has_gpu
from ...rollouts.engines.vllm.engine import VLLMEngine, server_settings
from ...rollouts.engines.vllm.server import start_servers
from ...rollouts.engines.vllm.server_args import GUARD
from ...rollouts.renderer import ChatRenderer
from ..errors import RunError
from ..model.adapters import Adapters
from .measure import Options, machine, table
from .publish import say, served
from .update import Case, disturb, recorded

ADAPTERS = (0, 1, 2, 4, 8)
CALLERS = 8  # requests at once
PROMPT, REPLY = 32, 32  # tokens of a wave's requests
PREFIX = 384  # tokens of the prompt that is met anew, and met again
POLICIES = [PolicySpec(f"agent{k}") for k in range(max(ADAPTERS))]


def serve(options: Options) -> dict[str, Any]:
    """Tokens per second by number of adapters, seconds to the first token on a prefix miss and hit,
    with the guard and without."""
    if options.engine not in ("", "vllm"):
        raise RunError(f"bench serve: measures vLLM servers of ours, not {options.engine}")
    results = {}
    for name, guard in (("guard", GUARD), ("open", "")):
        with served(options, "vllm", POLICIES) as (_, tokens, folder, model):
            start = partial(_start, model, tokens, folder, guard)
            results[name] = asyncio.run(_measure(start, folder, model, options.repeats))
    first = results["guard"]
    rows = [
        [way, what, f"{value:,.3f}" if value < 10 else f"{value:,.0f}"]
        for way, part in results.items()
        for what, value in (
            *(
                (f"tokens/s, {n} adapters", part["tokens_per_second"][n])
                for n in part["tokens_per_second"]
            ),
            *(
                (f"first token after {PREFIX} tokens, {name}, s", part[name])
                for name in ("miss", "hit")
            ),
        )
    ]
    ratios = {
        f"miss_over_hit@{PREFIX}": first["miss"] / first["hit"],
        **{
            f"base_over_adapters@{n}": first["tokens_per_second"]["0"] / v
            for n, v in first["tokens_per_second"].items()
            if n != "0"
        },
        **{
            f"open_over_guard@{n}": results["open"]["tokens_per_second"][n] / v
            for n, v in first["tokens_per_second"].items()
        },
    }
    return {
        "suite": "serve",
        "size": options.size,
        "clock": "wall",
        **machine(),
        "callers": CALLERS,
        "prompt": PROMPT,
        "reply": REPLY,
        "prefix": PREFIX,
        "servers": results,
        "ratios": ratios,
        **table(
            f"serve: vLLM, {options.size}, {CALLERS} requests at once",
            ["server", "what", "median"],
            rows,
        ),
    }


async def _start(model: str, tokens: ChatRenderer, folder: Path, guard: str) -> Engine:
    """An engine on a server with this middleware ("" = none)."""
    dtype = choose_dtype(model, "auto", on_gpu=has_gpu())
    config = EngineConfig(engine="vllm", max_model_len=512, engine_dtype=dtype)
    settings = replace(server_settings(model, POLICIES, config, folder, say), guard=guard)
    servers = await start_servers(settings, progress=say)
    return VLLMEngine(servers, tokens, adapter_root=folder / "versions")


async def _measure(start: Any, folder: Path, model: str, repeats: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    adapters = Adapters(AutoModelForCausalLM.from_pretrained(model), POLICIES, seed=0)
    disturb(adapters, seed=1, std=0.002)
    engine: Engine = await start()
    try:
        folders = {
            p.name: adapters.save(p.name, folder / "versions" / f"{p.name}-v1-bench")
            for p in POLICIES
        }
        refs = [
            ModelRef(policy, version) for policy, version in (await engine.publish(folders)).items()
        ]
        return await measured(engine, refs, CALLERS, repeats)
    finally:
        await engine.close()


async def measured(
    engine: Engine,
    refs: Sequence[ModelRef],
    callers: int,
    repeats: int,
    *,
    numbers: Sequence[int] = (),
    reply: int = REPLY,
) -> dict[str, Any]:
    """What this engine gives with the first 0, 1, 2 ... of these adapters (`numbers`; none:
    `ADAPTERS`), in turns, after one round that does not count."""
    numbers = [n for n in numbers or ADAPTERS if n <= len(refs)]
    rates: dict[str, list[float]] = {str(n): [] for n in numbers}
    waits: dict[str, list[float]] = {"miss": [], "hit": []}
    for lap in range(repeats + 1):
        for n in numbers:
            seconds, tokens = await _wave(
                engine,
                list(refs[:n]) or [ModelRef("base")],
                callers,
                seed=100 * lap + n,
                reply=reply,
            )
            rates[str(n)] += [tokens / seconds] if lap else []
        prefix = recorded(Case(1, PREFIX, 1), seed=10_000 + lap)[0].ids[:PREFIX]
        for name in waits:  # the same prompt, met for the first time and once more
            begun = time.perf_counter()
            await engine.generate(prefix, refs[0], Sampling(max_tokens=1, seed=0))
            waits[name] += [time.perf_counter() - begun] if lap else []
    return {
        "tokens_per_second": {n: statistics.median(laps) for n, laps in rates.items()},
        **{name: statistics.median(laps) for name, laps in waits.items()},
    }


async def _wave(
    engine: Engine, refs: Sequence[ModelRef], callers: int, *, seed: int, reply: int
) -> tuple[float, int]:
    """(seconds, sampled tokens) of as many requests at once, with prompts of no earlier request."""
    prompts = [
        sample.ids[:PROMPT]
        for k in range(callers)
        for sample in recorded(Case(1, PROMPT, 1), seed=seed * callers + k)
    ]
    begun = time.perf_counter()
    replies = await asyncio.gather(
        *(
            engine.generate(p, refs[k % len(refs)], Sampling(max_tokens=reply, seed=seed + k))
            for k, p in enumerate(prompts)
        )
    )
    return time.perf_counter() - begun, sum(
        len(one.token_ids) for group in replies for one in group
    )
