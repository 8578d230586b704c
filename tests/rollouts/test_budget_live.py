"""A budget is never exceeded by one token: whole episodes, many at once, on an engine in process, on
vLLM, and on an outside server with latencies, faults and reports of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from marlora.agents.patterns.debate import Debate
from marlora.agents.types import Completion, PolicySpec, Sampling, Task
from marlora.rollouts.budget import Budget, Price
from marlora.rollouts.engines.base import Engine, ModelRef
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.episodes.completers import APICompleter, Completer, EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeLimits, EpisodeRunner, episode_requests
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.ledger import BudgetSpent, Ledger
from marlora.rollouts.renderer import ChatRenderer
from marlora.rollouts.types import Episode, Kind
from tests.live_server import Live

AGENTS = ("a", "b", "c")
TASKS = [Task(f"t{n}", f"{n}+{n}=" + "?" * (7 * n % 40), str(2 * n)) for n in range(12)]
USD = Price("USD", prompt=3.0, sampled=15.0)


@dataclasses.dataclass
class Played:
    """What became of a run: its ledger, the episodes that it stored as they are read back, and how
    it ended ("" if all was played)."""

    ledger: Ledger
    stored: list[Episode]
    ended: str

    @property
    def tokens(self) -> int:
        spent = self.ledger.spent()
        return spent.prompt_tokens + spent.sampled_tokens


async def play(
    completers: Mapping[str, Completer], ledger: Ledger, folder: Path, kind: Kind = "train"
) -> Played:
    """A debate of three agents on every task, two samples each, eight at once, stored as they
    end."""
    runner = EpisodeRunner(
        Debate(list(AGENTS)),
        completers,
        sampling=Sampling(max_tokens=6),
        limits=EpisodeLimits(concurrency=8),
        ledger=ledger,
    )
    plan = episode_requests(TASKS, label="step-1", num_generations=2, kind=kind)
    ended, yielded = "", list[Episode]()
    with Store(folder) as store:
        try:
            async for episode in runner.collect(plan):
                store.append(episode)
                ledger.stored(episode)
                yielded.append(episode)
        except BudgetSpent as spent:
            ended = str(spent)
    with Store(folder) as store:
        stored = list(store)
    assert stored == yielded
    return Played(ledger, stored, ended)


def check_whole(played: Played) -> None:
    """Every stored episode came to its end; with what the ledger says beside the store, they are
    all that was spent."""
    beside = [row for row in played.ledger.state_dict()["unstored"] if row["kind"] != "eval"]
    for episode in played.stored:
        assert episode.error is None and episode.stop_reason == "done"
        assert len(episode.turns) == 2 * len(AGENTS) and episode.output is not None
    usages = [usage for episode in played.stored for usage in episode.usage.values()]
    assert played.tokens == sum(u.prompt_tokens + u.sampled_tokens for u in usages) + sum(
        row["prompt_tokens"] + row["sampled_tokens"] for row in beside
    )
    assert played.ledger.spent().calls == sum(u.calls for u in usages) + sum(
        row["calls"] for row in beside
    )


# engines that are ours


class Counting:
    """An engine that counts the tokens it was given and has sampled; `largest` of one call."""

    def __init__(self, engine: Engine, tokens: ChatRenderer) -> None:
        self.engine, self.tokens = engine, tokens
        self.served = self.calls = self.largest = 0

    async def generate(
        self, ids: Sequence[int], ref: ModelRef, sampling: Sampling, n: int = 1
    ) -> list[Completion]:
        self.served, self.calls = self.served + len(ids), self.calls + 1
        completions = await self.engine.generate(ids, ref, sampling, n)
        sampled = sum(len(completion.token_ids) for completion in completions)
        self.served += sampled
        self.largest = max(self.largest, len(ids) + n * sampling.max_tokens)
        return completions


async def on_engine(engine: Counting, budget: Budget, folder: Path) -> Played:
    one = EngineCompleter(engine, engine.tokens, "base")  # type: ignore[arg-type]
    return await play(dict.fromkeys(AGENTS, one), Ledger(budget), folder)


async def check_engine(start: Callable[[], Counting], folder: Path) -> None:
    """Half of what the run needs is never exceeded, and is used but for one call; all that it needs
    is enough."""
    free = start()
    whole = await on_engine(free, Budget(), folder / "free")
    assert not whole.ended and len(whole.stored) == 24 and whole.tokens == free.served
    check_whole(whole)
    for name in ("tokens", "calls"):
        limit = (free.served if name == "tokens" else free.calls) // 2
        engine = start()
        half = await on_engine(engine, Budget(**{name: limit}), folder / name)
        spent = engine.served if name == "tokens" else engine.calls
        assert spent <= limit and half.ended.startswith(f"budget.{name} is {limit}: {spent} spent")
        assert spent > limit - (engine.largest + 6 if name == "tokens" else 1)
        assert half.tokens == engine.served and half.ledger.spent().calls == engine.calls
        check_whole(half)


def test_in_process(model: Path, tmp_path: Path) -> None:
    async def go() -> None:
        engine = TransformersEngine(model)
        try:
            await check_engine(lambda: Counting(engine, engine.tokens), tmp_path)
        finally:
            await engine.close()

    asyncio.run(go())


@pytest.mark.server
@pytest.mark.timeout(900)
def test_on_vllm(server: Live, tmp_path: Path) -> None:
    async def go() -> None:
        engine = server.engine()
        try:
            await check_engine(lambda: Counting(engine, server.tokens), tmp_path)
        finally:
            await engine.close()

    asyncio.run(go())


# an outside server


class Outside:
    """A server that charges what it likes within what is asked of it.

    A token of a prompt is a byte of its texts, and 20 more each message. It answers after a random
    time. One request in ten it refuses (429 or 500: nothing is charged), and with one in ten of the
    others, as `fault` says, it charges and drops the connection ("lost", each request once at most)
    or does not say how much it has charged ("silent").
    """

    def __init__(self, seed: int, fault: str) -> None:
        self.fault, self.faults = fault, 0
        self.rng, self.served, self.charged = random.Random(seed), [0, 0], 0
        self.lost = set[str]()

    @property
    def tokens(self) -> int:
        return sum(self.served)

    @property
    def cost(self) -> float:
        return (self.served[0] * USD.prompt + self.served[1] * USD.sampled) / 1e6

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        await asyncio.sleep(self.rng.random() / 50)
        event = self.rng.random()
        if event < 0.1:
            return web.Response(status=self.rng.choice((429, 500)), text="not now")
        prompt = sum(20 + len(m["content"].encode()) for m in body["messages"])
        self.charged += 1
        self.served[0] += prompt
        sampled = 0
        for _ in range(self.rng.randint(1, body["max_tokens"])):
            await asyncio.sleep(0)
            sampled, self.served[1] = sampled + 1, self.served[1] + 1
        usage = {"prompt_tokens": prompt, "completion_tokens": sampled}
        if event < 0.2 and self.fault == "silent":
            self.faults += 1
            usage = self.rng.choice([{}, {"prompt_tokens": -1, "completion_tokens": None}])
        elif event < 0.2 and str(body) not in self.lost:
            assert request.transport is not None
            self.faults += 1
            self.lost.add(str(body))
            request.transport.close()
        choice = {"message": {"content": "x" * sampled}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})


@contextlib.asynccontextmanager
async def serve(outside: Outside) -> AsyncIterator[APICompleter]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", outside.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield APICompleter(PolicySpec("far", url=url), pause=0.001, tries=20)
    finally:
        await runner.cleanup()


async def on_outside(
    outside: Outside, budget: Budget, folder: Path, kind: Kind = "train", price: Price | None = None
) -> Played:
    prices = dict.fromkeys(AGENTS, price) if price else {}
    async with serve(outside) as completer:
        return await play(dict.fromkeys(AGENTS, completer), Ledger(budget, prices), folder, kind)


def amount(of: Any, name: str) -> float:
    """What a server or a ledger counts under the name of a limit."""
    if isinstance(of, Outside):
        return {"tokens": of.tokens, "calls": of.charged, "cost": of.cost}[name]
    spent = of.ledger.spent()
    return {"tokens": of.tokens, "calls": spent.calls, "cost": spent.cost}[name]


@pytest.mark.parametrize("fault", ["lost", "silent"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["tokens", "calls", "cost"])
def test_an_outside_server(name: str, seed: int, fault: str, tmp_path: Path) -> None:
    price = USD if name == "cost" else None

    async def go() -> None:
        free = Outside(seed, fault)
        whole = await on_outside(free, Budget(), tmp_path / "free", price=price)
        assert not whole.ended and len(whole.stored) == 24 and free.faults > 3
        check_whole(whole)
        # what was lost or not reported counts as the most that it can be
        assert amount(free, name) < amount(whole, name) or (
            name == "calls" and free.charged == whole.ledger.spent().calls
        )
        limit: float = amount(free, name) / 2
        limit = limit if name == "cost" else math.floor(limit)
        budget, outside = Budget(**{name: limit}), Outside(seed, fault)
        half = await on_outside(outside, budget, tmp_path / "half", price=price)
        assert half.ended.startswith(f"budget.{name} is ") and outside.faults
        assert limit / 4 < amount(outside, name) <= amount(half, name) <= limit * (1 + 1e-9)
        assert 0 < len(half.stored) < 24
        check_whole(half)

    asyncio.run(go())


def test_evaluation_is_metered_and_goes_on(tmp_path: Path) -> None:
    async def go() -> None:
        outside = Outside(0, "lost")
        played = await on_outside(outside, Budget(tokens=1), tmp_path, kind="eval")
        assert not played.ended and len(played.stored) == 24 and played.tokens == 0
        rows = played.ledger.rows()["eval"].values()
        told = sum(row["prompt_tokens"] + row["sampled_tokens"] for row in rows)
        assert told >= outside.tokens > 0 and outside.faults

    asyncio.run(go())


def test_a_budget_too_small_for_the_first_call_leaves_an_empty_store(tmp_path: Path) -> None:
    async def go() -> None:
        outside = Outside(0, "lost")
        played = await on_outside(outside, Budget(tokens=100), tmp_path)
        assert played.stored == [] and outside.charged == 0
        assert played.ended.startswith("budget.tokens is 100: 0 spent, and the next call (train")

    asyncio.run(go())
