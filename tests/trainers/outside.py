"""A stand-in for a model that others serve: an OpenAI-compatible address in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web


class Outside:
    """`with Outside(lambda body: "text") as outside: outside.url`; `bodies` are the requests that
    came."""

    def __init__(self, answer: Callable[[dict[str, Any]], str]) -> None:
        self.answer, self.bodies, self.url = answer, [], ""  # type: ignore[var-annotated]

    def __enter__(self) -> Outside:
        self._loop, ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._serve(ready)), daemon=True
        )
        self._thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(30)
        self._loop.close()

    async def _serve(self, ready: threading.Event) -> None:
        self._ended = asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._reply)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        await self._ended.wait()
        await runner.cleanup()

    async def _reply(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        return web.json_response(
            {"choices": [{"message": {"content": self.answer(body)}}] * body.get("n", 1)}
        )
