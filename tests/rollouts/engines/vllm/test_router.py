"""A router before several servers: it is asked to generate, they themselves to load and to prove.
Servers without a model."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.vllm.engine import Routes, VLLMEngine
from marlora.rollouts.engines.vllm.protocol import request_body
from marlora.rollouts.engines.vllm.router import SESSION
from tests.rollouts.engines.vllm.test_engine import BASE, DRAW, KEY, QUICK, adapter
from tests.rollouts.fake_vllm import EOS, FakeVLLM, Tokens, sampled

FIRST = [2, 3, 4]


class FakeRouter:
    """Hands every request on to one of the servers, by its `X-Session-ID`, and remembers both."""

    def __init__(self, *urls: str) -> None:
        self.urls = urls
        self.seen: list[tuple[str, str | None, str]] = []  # path, session, server

    def __enter__(self) -> FakeRouter:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as self._session:
            ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        session = request.headers.get(SESSION)
        server = self.urls[sum((session or "").encode()) % len(self.urls)]
        if (
            request.path != "/metrics"
        ):  # which the client's watch asks for when replies are slow to come
            self.seen.append((request.path, session, server))
        headers = {
            "Authorization": request.headers.get("Authorization", ""),
            "Content-Type": "application/json",
        }
        async with self._session.request(
            request.method, server + request.path, data=await request.read(), headers=headers
        ) as reply:
            return web.Response(
                status=reply.status, body=await reply.read(), content_type=reply.content_type
            )


def play(
    root: Path,
    router: str,
    servers: list[FakeVLLM],
    work: Callable[[VLLMEngine], Awaitable[None]],
    **more: Any,
) -> None:
    async def run() -> None:
        engine = VLLMEngine(
            [s.url for s in servers],
            Tokens(),
            adapter_root=root,
            key=KEY,
            retry=QUICK,
            router=router,
            **more,
        )
        try:
            await work(engine)
        finally:
            await engine.close()

    asyncio.run(run())


# what a chat is


def test_a_chat_has_the_id_of_its_first_prompt() -> None:
    routes, again = Routes(), Routes()
    first = routes.chat("solver", FIRST)
    assert first == again.chat("solver", FIRST) and first.startswith("solver-"), (
        "in every process the same"
    )
    assert (
        routes.chat("solver", [*FIRST, 9, 9]) == first
        and routes.chat("solver", [*FIRST, 9, 9, 1, 7]) == first
    )
    assert routes.chat("solver", [*FIRST, 8, 8]) == first, "another chat that began alike"
    assert routes.chat("critic", FIRST) != first and routes.chat("solver", [3, *FIRST]) != first


# with a stand-in for the router


def test_generation_goes_through_the_router_and_adapters_to_every_server(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two, FakeRouter(one.url, two.url) as router:

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folder})
            assert one.loaded == two.loaded == {"solver-v1-aa": str(folder)} and router.seen == []
            ref = ModelRef("solver", "solver-v1-aa")
            chats = {k: [[2, 10 + k], [2, 10 + k, 5, EOS, 7]] for k in range(12)}
            for k in range(12):
                for prompt in chats[k]:
                    (reply,) = await engine.generate(prompt, ref, DRAW)
                    assert (
                        reply.token_ids == tuple(sampled("solver-v1-aa", prompt, 100, 6))
                        and reply.version == "solver-v1-aa"
                    )
            assert {path for path, *_ in router.seen} == {"/v1/completions"} and len(
                router.seen
            ) == 24
            sessions = [session for _, session, _ in router.seen]
            assert sessions[::2] == sessions[1::2] and len(set(sessions)) == 12, (
                "both prompts of a chat, and no other's"
            )
            assert {server for *_, server in router.seen} == {one.url, two.url}
            # A server that is named is asked itself, and so is whoever scores.
            before = len(router.seen)
            for server in (one, two):
                await engine.generate([2, 3], ref, DRAW, replica=server.url)
                assert server.completions()[-1]["prompt"] == [2, 3]
                await engine.score([2, 3], ref, server.url)
            await engine.score([2, 3], ref)
            assert len(router.seen) == before
            await engine.retire(ref)
            assert one.loaded == two.loaded == {}

        play(tmp_path, router.url, [one, two], work)


def test_a_server_that_was_started_again_behind_the_router_gets_its_adapters_again(
    tmp_path: Path,
) -> None:
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two, FakeRouter(one.url, two.url) as router:

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folder})
            two.loaded.clear()
            replies = await asyncio.gather(
                *(
                    engine.generate([2, k], ModelRef("solver", "solver-v1-aa"), DRAW)
                    for k in range(8)
                )
            )
            assert [r.token_ids for (r,) in replies] == [
                tuple(sampled("solver-v1-aa", [2, k], 100, 6)) for k in range(8)
            ]
            assert two.loaded == {"solver-v1-aa": str(folder)} and engine.fleet.lost == {}

        play(tmp_path, router.url, [one, two], work)


def test_a_server_behind_the_router_is_given_time_to_get_its_adapters_from_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marlora.rollouts.engines.vllm.replicas.PAUSES", (0.01, 5.0))
    ref = ModelRef("solver", "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two, FakeRouter(one.url, two.url) as router:
        one.loaded[ref.version] = "/versions/solver-v1-aa"

        async def work(engine: VLLMEngine) -> None:
            asking = asyncio.gather(*(engine.generate([2, k], ref, DRAW) for k in range(8)))
            while not engine.fleet.lost:
                await asyncio.sleep(0.01)
            two.loaded[ref.version] = "/versions/solver-v1-aa"
            assert [r.token_ids for (r,) in await asking] == [
                tuple(sampled(ref.version, [2, k], 100, 6)) for k in range(8)
            ]
            assert not any("lora_name" in (body or {}) for _, _, body in two.requests)

        play(tmp_path, router.url, [one, two], work, foreign=True)


def test_a_version_is_retired_when_no_request_is_on_its_way_through_the_router(
    tmp_path: Path,
) -> None:
    folder = adapter(tmp_path, "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two, FakeRouter(one.url, two.url) as router:

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folder})
            ref = ModelRef("solver", "solver-v1-aa")
            one.held = two.held = {"solver-v1-aa"}
            slow = asyncio.create_task(engine.generate(FIRST, ref, DRAW))
            while not router.seen:
                await asyncio.sleep(0.01)
            going = asyncio.create_task(engine.retire(ref))
            await asyncio.sleep(0.1)
            assert not going.done() and one.loaded and two.loaded
            with pytest.raises(EngineError, match="was retired"):
                await engine.generate(FIRST, ref, DRAW)
            one.hold.set(), two.hold.set()
            await going
            assert slow.done() and one.loaded == two.loaded == {}

        play(tmp_path, router.url, [one, two], work)


def test_what_a_router_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="router_url: name the servers behind the router too"):
        choose_engine(EngineConfig(router_url="http://127.0.0.1:30000"))
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        engine = VLLMEngine([one.url, two.url], Tokens(), adapter_root=tmp_path, key=KEY)
        next(iter(engine.replicas.values())).client.key = "another key of the same length"
        with pytest.raises(
            SettingError, match="a router sends one key to all servers, but they have 2"
        ):
            engine._routed_by("http://127.0.0.1:30000", QUICK)


# with vllm-router itself


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def vllm_router(log: Path, *urls: str) -> Iterator[str]:
    """As users start it: by its command, chats kept together by their id."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm-router")),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "--policy",
        "consistent_hash",
        "--prometheus-port",
        str(free_port()),
        "--worker-urls",
        *urls,
    ]
    process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                threading.Event().wait(0.1)
        else:
            raise AssertionError(log.read_text()[-2000:])
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.process
@pytest.mark.timeout(300)
def test_vllm_router_hands_on_all_that_is_asked_and_keeps_chats_together(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "solver-v1-aa")
    every = Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        max_tokens=6,
        stop=("x",),
        seed=2**61 + 5,
        grammar=json.dumps({"regex": "a+"}),
        logit_bias={"5": -100.0},
    )
    with (
        FakeVLLM(key=KEY) as one,
        FakeVLLM(key=KEY) as two,
        vllm_router(tmp_path / "log", one.url, two.url) as router,
    ):

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folder})
            assert one.loaded == two.loaded == {"solver-v1-aa": str(folder)}
            await engine.generate(FIRST, ModelRef("solver", "solver-v1-aa"), every, n=2)
            (body,) = [*one.completions(), *two.completions()]
            sent = request_body(FIRST, "solver-v1-aa", every, 2, (EOS,))
            assert {name: body.get(name) for name in sent} == sent, (
                "no field is lost or changed on the way"
            )
            assert set(body) - set(sent) == {"echo", "no_stop_trim", "return_hidden_states"}
            places: dict[int, set[str]] = {}
            for k in range(16):
                for prompt in ([2, 10 + k], [2, 10 + k, 5, EOS, 7]):
                    (reply,) = await engine.generate(
                        prompt, ModelRef("solver", "solver-v1-aa"), DRAW
                    )
                    assert reply.token_ids == tuple(sampled("solver-v1-aa", prompt, 100, 6))
                    here = [
                        s.url
                        for s in (one, two)
                        if s.completions()[-1:] and s.completions()[-1]["prompt"] == prompt
                    ]
                    places.setdefault(k, set()).update(here)
            assert all(len(servers) == 1 for servers in places.values()), (
                "both prompts of a chat went to one server"
            )
            assert set.union(*places.values()) == {one.url, two.url}
            two.stop()
            replies = await asyncio.gather(*(engine.generate([2, k], BASE, DRAW) for k in range(8)))
            assert [r.token_ids for (r,) in replies] == [
                tuple(sampled("served-base", [2, k], 100, 6)) for k in range(8)
            ]

        play(tmp_path, router, [one, two], work)
