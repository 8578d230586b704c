"""A vLLM server without a model: the routes the engine uses, from a table, with scripted faults.

Runs in a thread of its own (`with FakeVLLM() as fake`), or as a process: `python fake_vllm.py PORT
KEY_FILE`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
import uuid
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

from marlora.rollouts.engines.vllm.cpu_lora import MARK

EOS = 1
VOCAB = 50


def sampled(model: str, prompt: list[int], seed: int, length: int) -> list[int]:
    """The tokens this server samples: a pure function of what was asked, like a seeded server's."""
    tokens = []
    for position in range(length):
        digest = hashlib.sha256(json.dumps([model, prompt, seed, position]).encode()).digest()
        tokens.append(digest[0] % VOCAB)
        if tokens[-1] == EOS:
            break
    return tokens


def table(token: int) -> float:
    """The log-probability this server gives to a token: another one for each token, so that a wrong
    alignment shows."""
    return -(token + 1) / 8


class Tokens:
    """Stands for ChatRenderer: token 7 is `<7>`."""

    eos_ids = (EOS,)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<{token}>" for token in ids)


class FakeVLLM:
    """`with FakeVLLM() as fake: VLLMEngine([fake.url], ...)`.

    Attributes:
        faults: what happens to the next completions, one each: a status (`"500"`), `reset`, `half`,
            `garbage`, `list`, `short`, `long`, `nan`, `no logprobs`, `extra choice`, `twice`,
            `other model`, `other prompt`, `abort`, `slow`, `again` (the reply a second time, later,
            on the kept connection), `stall` (no answer), `drip` (a byte at a time, for ever).
        dead: completions hang, while /health and /metrics go on answering. busy: they hang as long,
            but tokens are generated.
        requests: (path, key, body) of everything that came. loaded: adapters by name.
        key: if set, what must be sent as a bearer token. open_routes: answered without it.
    """

    def __init__(
        self,
        *,
        key: str = "",
        open_routes: Iterable[str] = (),
        faults: Iterable[str] = (),
        context: int = 64,
        port: int = 0,
    ) -> None:
        self.key, self.open_routes, self.context, self.port = key, set(open_routes), context, port
        self.faults = deque(faults)
        self.dead = self.busy = False
        self.hold = threading.Event()  # completions named in `held` wait for it
        self.held: set[str] = set()
        self.requests: list[tuple[str, str | None, Any]] = []
        self.loaded: dict[str, str] = {}
        self.tokens = 0
        self.url = ""

    def __enter__(self) -> FakeVLLM:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone. Safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def completions(self) -> list[dict[str, Any]]:
        return [body for path, _, body in self.requests if path == "/v1/completions" and body]

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        given = request.headers.get("Authorization")
        self.requests.append((request.path, given, body))
        if (
            self.key
            and given != f"Bearer {self.key}"
            and request.path not in self.open_routes | {"/health"}
        ):
            return web.json_response({"error": "a key is needed"}, status=401)
        if request.path == "/health":
            return web.Response()
        if request.path == "/metrics":
            self.tokens += self.busy
            return web.Response(
                text=f'# HELP x\nvllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n'
            )
        if request.path == "/v1/models":
            base = {
                "id": "served-base",
                "root": "/models/base",
                "parent": None,
                "max_model_len": self.context,
            }
            adapters = [
                {"id": name, "root": path, "parent": "served-base"}
                for name, path in self.loaded.items()
            ]
            return web.json_response({"data": [base, *adapters]})
        if request.path.endswith("_lora_adapter") and body:
            return self._adapter(request.path, body)
        if request.path == "/v1/completions" and body:
            return await self._complete(request, body)
        return error(
            400 if request.path in self.open_routes or request.path == "/v1/completions" else 404,
            "no such thing",
        )

    def _adapter(self, path: str, body: dict[str, Any]) -> web.Response:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            known = self.loaded.pop(name, None)
            return (
                web.Response(text="removed")
                if known
                else error(404, f"The lora adapter '{name}' cannot be found.")
            )
        if name in self.loaded:
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        self.loaded[name] = body["lora_path"]
        if self.faults and self.faults[0] == "load lost":
            self.faults.popleft()
            return error(500, "loaded, but the answer was lost")
        return web.Response(text="Success")

    async def _complete(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body["model"] != "served-base" and body["model"] not in self.loaded:
            return error(404, f"The model `{body['model']}` does not exist.")
        while body["model"] in self.held and not self.hold.is_set():
            await asyncio.sleep(0.01)
        while self.dead or self.busy:
            await asyncio.sleep(0.02)
        fault = self.faults.popleft() if self.faults else ""
        if fault.isdigit():
            return error(int(fault), f"scripted {fault}")
        if fault == "slow":
            await asyncio.sleep(0.5)
        if fault == "stall":
            await asyncio.Event().wait()
        if fault == "drip":
            response = web.StreamResponse(
                headers={"Content-Length": "1000000", "Content-Type": "application/json"}
            )
            await response.prepare(request)
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.02)
        reply = self._reply(body, request.headers.get("X-Request-Id") or uuid.uuid4().hex)
        spoil(reply, fault)
        text = json.dumps(reply)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "again":
            transport, head = (
                request.transport,
                (
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length:"
                    f" {len(text)}\r\n\r\n"
                ),
            )
            assert transport is not None
            self._loop.call_later(0.03, transport.write, (head + text).encode())
        if fault == "half":
            response = web.StreamResponse(
                headers={"Content-Length": str(len(text)), "Content-Type": "application/json"}
            )
            await response.prepare(request)
            await response.write(text[: len(text) // 2].encode())
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(
            text={"garbage": "<html>busy</html>", "list": "[]"}.get(fault, text),
            content_type="application/json",
        )

    def _reply(self, body: dict[str, Any], name: str) -> dict[str, Any]:
        choices = []
        for k in range(body.get("n", 1)):
            tokens = sampled(
                body["model"], body["prompt"], body.get("seed", 0) + k, body["max_tokens"]
            )
            scored: list[Any] = [
                None,
                *({str(token): {"logprob": table(token)}} for token in body["prompt"][1:]),
            ]
            choices.append(
                {
                    "index": k,
                    "text": "never used",
                    "token_ids": tokens,
                    "logprobs": {"token_logprobs": [table(token) for token in tokens]},
                    "finish_reason": "stop" if tokens[-1] == EOS else "length",
                    "prompt_token_ids": body["prompt"],
                    "prompt_logprobs": scored if "prompt_logprobs" in body else None,
                }
            )
        self.tokens += sum(len(choice["token_ids"]) for choice in choices)
        return {
            "id": f"cmpl-{name}",
            "model": body["model"],
            "choices": choices[::-1],
        }  # order is not promised


def spoil(reply: dict[str, Any], fault: str) -> None:
    """Make a good reply wrong."""
    choice = reply["choices"][0]
    if fault == "short":
        choice["token_ids"] = choice["token_ids"][:-1]
    elif fault == "long":
        choice["token_ids"], choice["logprobs"]["token_logprobs"] = [5] * 1000, [-1.0] * 1000
    elif fault == "nan":
        choice["logprobs"]["token_logprobs"][0] = float("nan")
    elif fault == "no logprobs":
        choice["logprobs"] = None
    elif fault == "extra choice":
        reply["choices"].append({**choice, "index": 99})
    elif fault == "twice":
        reply["choices"].append(dict(choice))
    elif fault == "other model":
        reply["model"] = "served-base-2"
    elif fault == "other prompt":
        choice["prompt_token_ids"] = [0]
    elif fault == "abort":
        choice["finish_reason"] = "abort"


def error(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text, "code": status}}, status=status)


if __name__ == "__main__":
    print(MARK, flush=True)
    with FakeVLLM(key=Path(sys.argv[2]).read_text(), port=int(sys.argv[1])):
        threading.Event().wait()
