"""HTTP client of one vLLM server: single tries, and checks of what comes back.

Retries are `Replica`'s (replicas.py), the watchdog and restarts are `ReplicaHealth`'s (health.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from ...http import Response, Transient, open_session, send
from ..base import EngineError
from .auth import URL_FILE, read_key

T = TypeVar("T")

COMPLETION_IDS = 4096  # ids of completions that are remembered
REQUEST_ID = "X-Request-Id"
MARK = "marlora-"  # begins the ids of our requests
ORDER_SECONDS = 60.0  # loading or unloading an adapter may take this long
GROWTH = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total")


class RequestRefused(EngineError):
    """The server understood the request and refused it (HTTP 4xx): a retry would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ReplicaClient:
    """Requests to one server, one try each. A failed try raises `Transient` or `RequestRefused`.

    Args:
        name: of the replica; its URL for a server that was not started here.
        url, key: where it listens, and the bearer token it asks for ("" = none).
        base: name under which it serves the base model.
        key_file: where another process that starts the server again writes its new key, with its
            URL in a file beside it ("" = nowhere).
    """

    def __init__(self, name: str, url: str, key: str, base: str, key_file: str = "") -> None:
        self.name, self.url, self.key, self.base, self.key_file = name, url, key, base, key_file
        self._completion_ids: OrderedDict[str, None] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession

    def __str__(self) -> str:
        return f"server {self.name} ({self.url})" if self.name != self.url else f"server {self.url}"

    async def attach(self) -> bool:
        """Open an HTTP session on the running event loop unless one is open; True if it was needed.

        Connections belong to one event loop; a caller may use several, one after the other.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return False
        if self._loop is not None:
            # the loop of its connections is closed and cannot end them in good order
            with contextlib.suppress(RuntimeError):
                await self._session.close()
        self._loop, self._session = loop, open_session()
        return True

    async def close(self) -> None:
        if self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._loop = None

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        seconds: float,
        read: Callable[[Any], T] = lambda reply: reply,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """One try; `read` gets the reply and may raise `Transient`."""
        asked = MARK + uuid.uuid4().hex
        return await send(
            self._session,
            method,
            self.url + path,
            lambda response: read(self._reply(method, path, response, asked)),
            body=body,
            key=self.key,
            headers={**(headers or {}), REQUEST_ID: asked},
            seconds=seconds,
        )

    def _reply(self, method: str, path: str, response: Response, asked: str) -> Any:
        """The reply as JSON, or as text where the route answers in plain text.

        A completion whose id came before, or is that of another request of ours, is rejected: a
        server or proxy that sends one twice leaves it on the open connection, where it would answer
        the next request, whose own reply would answer the one after it; and a sibling's request
        differs in nothing but the seed. vLLM makes a completion's id of the request's.
        """
        status, raw = response.status, response.body
        if response.may_pass:
            raise Transient(f"HTTP {status}: {error_message(raw)}")
        if status >= 400:
            raise RequestRefused(
                f"{self}: {method} {path}: HTTP {status}: {error_message(raw)}", status
            )
        if path == "/metrics" or path.endswith("_lora_adapter"):
            return raw.decode("utf-8", "replace")
        try:
            reply = json.loads(raw)
        except ValueError as error:
            raise Transient(f"the reply is no JSON: {raw[:80]!r}") from error
        name = reply.get("id") if isinstance(reply, dict) else None
        if name and isinstance(name, str):
            if MARK in name and asked not in name:
                raise Transient(f"reply {name!r} is another request's, this one is {asked!r}")
            if name in self._completion_ids:
                raise Transient(f"reply {name!r} came a second time")
            self._completion_ids[name] = None
            if len(self._completion_ids) > COMPLETION_IDS:
                self._completion_ids.popitem(last=False)
        return reply

    async def adapters(self, seconds: float) -> dict[str, str]:
        """The adapters that the server lists: {version: folder}."""
        return adapters_of(await self.send("GET", "/v1/models", seconds=seconds))

    async def load(self, version: str, folder: str) -> None:
        body = {"lora_name": version, "lora_path": folder}
        await self.send("POST", "/v1/load_lora_adapter", body, seconds=ORDER_SECONDS)

    async def unload(self, version: str) -> None:
        body = {"lora_name": version}
        await self.send("POST", "/v1/unload_lora_adapter", body, seconds=ORDER_SECONDS)

    async def generate_one(self, model: str, seconds: float) -> None:
        """Let `model` (the base or an adapter) generate one token."""
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0.0}
        await self.send("POST", "/v1/completions", body, seconds=seconds)

    async def token_count(self, seconds: float) -> float | None:
        """Tokens read and generated so far, over all requests; None if the server gives none."""
        try:
            text: str = await self.send("GET", "/metrics", seconds=seconds)
        except (Transient, RequestRefused):
            return None
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(GROWTH)
        )

    async def read_address(self) -> None:
        """Read key and URL again: a server that was started again has a new key, and another port
        if somebody had taken its own."""
        if self.key_file:
            self.key = await asyncio.to_thread(fresh_key, self.key_file)
            self.url = await asyncio.to_thread(fresh_url, self.key_file) or self.url


def fresh_key(path: str) -> str:
    """The key that is in the file now. Raises `Transient` while there is none."""
    try:
        return read_key(path)
    except (OSError, ValueError) as error:
        # a key given in place of the path was refused at start-up, see `secrecy`
        raise Transient(
            f"key file {path}: {error.strerror if isinstance(error, OSError) else error}"
        ) from error


def fresh_url(key_file: str) -> str:
    """The URL in the file beside the key file; "" if there is none: only servers that were started
    by marlora have one. Raises `Transient` while it cannot be read."""
    path = Path(key_file).with_suffix(URL_FILE)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise Transient(f"file {path}: {error.strerror}") from error


def adapters_of(reply: Any) -> dict[str, str]:
    """The adapters in a reply to /v1/models: {version: folder}."""
    try:
        return {entry["id"]: entry["root"] for entry in reply["data"] if entry.get("parent")}
    except (KeyError, TypeError) as error:
        raise Transient(f"the list of models has no such form: {error!r}") from error


def error_message(raw: bytes) -> str:
    """The message in the body of an error, at most 1000 characters."""
    text = raw.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:1000]
    return text[:1000]
