"""One vLLM server as seen over HTTP: requests with bounded retries, a look at whether it still
lives, and its revival.

`/health` says that a server's front answers, not that its engine computes. A replica counts as dead
when its process has ended, or when for `stall` seconds no request finished and no token was
generated although requests were open, and it then cannot generate one token. A dead server of ours
is started again (a bounded number of times) and loads its adapters again; requests that were open
are sent again with their seeds, so the result is the one they would have had.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from ..base import EngineError, ReplicaLost
from .auth import read_key
from .protocol import Transient
from .server import VLLMServer

T = TypeVar("T")

ANSWERS = 4096  # completions whose ids are remembered
GROWTH = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:request_success_total")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait and how often to try, in seconds and counts. Where there are several
    servers, see `vllm_fleet.hasty`.

    Args:
        retries: of one request after the first try. backoff: before the first retry, doubled each
            time, ±50 %, at most `longest`.
        request: one try may take this long. stall: no sign of life for so long is followed by a
            probe, which may take `probe`.
        gone: when all of several servers are lost, one may take this long to come back (ours:
            besides the time it may take to start).
    """

    retries: int = 6
    backoff: float = 0.5
    longest: float = 10.0
    request: float = 1800.0
    stall: float = 120.0
    probe: float = 30.0
    gone: float = 60.0


class ConnectionDropped(Transient):
    """The watch gave the server up while this request was open."""


class RequestRefused(EngineError):
    """The server understood the request and said no (HTTP 4xx): sending it again would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Replica:
    """One server. `adapters` are those to be loaded again after a restart; `open` counts requests
    in flight by served name.

    `alone`: there is no other, so requests wait while it is started again. Else they raise
    `ReplicaLost`, and `ReplicaPool` brings it back.
    """

    def __init__(
        self,
        name: str,
        url: str,
        key: str,
        base: str,
        patience: RetryPolicy,
        server: VLLMServer | None = None,
        key_file: str = "",
    ) -> None:
        self.name, self.url, self.key, self.base, self.key_file = name, url, key, base, key_file
        self.patience, self.server = patience, server
        self.adapters: dict[str, str] = {}
        self.open: Counter[str] = Counter()
        self.restarts = 0
        self.alone = True
        self._dead = ""  # why the watch gave it up
        self._finished = 0
        self._answered: OrderedDict[str, None] = OrderedDict()  # ids of completions that were read
        self._jitter = random.Random()  # not the global one: retries must not move anybody's seeds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession

    def __str__(self) -> str:
        return f"server {self.name} ({self.url})" if self.name != self.url else f"server {self.url}"

    # requests

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        read: Callable[[Any], T] = lambda reply: reply,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send, and `read` the reply (may raise `Transient`).

        Raises `Refused` for a 4xx, after the last try `EngineError`, or `ReplicaLost` if there are
        others to ask.
        """
        await self._attach()
        failure: Transient | None = None
        for attempt in range(self.patience.retries + 1):
            if attempt:
                pause = min(self.patience.backoff * 2 ** (attempt - 1), self.patience.longest)
                await asyncio.sleep(pause * self._jitter.uniform(0.5, 1.5))
            try:
                await self._revive()
                reply = await self._watched(
                    self._once(method, path, body, self.patience.request, read, headers)
                )
                self._finished += 1
                return reply
            except Transient as error:
                failure = error
                if isinstance(error, ConnectionDropped) and (self.server is None or not self.alone):
                    break  # not ours to start again, or not here
        kind = EngineError if self.alone else ReplicaLost
        raise kind(
            f"{self}: {method} {path} failed {attempt + 1} times, last: {failure}{self._tail()}"
        )

    async def _once(
        self,
        method: str,
        path: str,
        body: Any,
        seconds: float,
        read: Callable[[Any], Any] = lambda reply: reply,
        more: Mapping[str, str] | None = None,
    ) -> Any:
        """One try. The connection of a reply that is not believed is closed: what comes on it next
        may belong to another request."""
        headers = {**(more or {}), **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self.url + path, json=body, headers=headers, timeout=timeout
            ) as response:
                try:
                    return read(self._reply(method, path, response.status, await response.read()))
                except BaseException:
                    response.close()
                    raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Transient(
                f"{type(error).__name__}: {error or f'no answer for {seconds:.0f} s'}"
            ) from error

    def _reply(self, method: str, path: str, status: int, raw: bytes) -> Any:
        """What a reply says. Raises `Transient` or `Refused`.

        A completion that comes a second time is refused by its id: a server or proxy that sends one
        twice leaves it on the kept connection, where it would answer the next request, and a
        sibling's request differs from it in nothing but the seed.
        """
        if status == 429 or status >= 500:
            raise Transient(f"HTTP {status}: {message(raw)}")
        if status >= 400:
            raise RequestRefused(f"{self}: {method} {path}: HTTP {status}: {message(raw)}", status)
        if path == "/metrics" or path.endswith("_lora_adapter"):  # these answer in plain text
            return raw.decode("utf-8", "replace")
        try:
            reply = json.loads(raw)
        except ValueError as error:
            raise Transient(f"the reply is no JSON: {raw[:80]!r}") from error
        name = reply.get("id") if isinstance(reply, dict) else None
        if name and isinstance(name, str):
            if name in self._answered:
                raise Transient(f"reply {name!r} came a second time")
            self._answered[name] = None
            if len(self._answered) > ANSWERS:
                self._answered.popitem(last=False)
        return reply

    async def listed(self) -> dict[str, str]:
        """What the server says it has loaded: {version: folder}."""
        return await self.request("GET", "/v1/models", read=loaded)

    async def load(self, version: str, folder: str) -> None:
        """Load an adapter. One that a lost reply had already loaded from this folder is taken as
        loaded."""
        try:
            await self.request(
                "POST", "/v1/load_lora_adapter", {"lora_name": version, "lora_path": folder}
            )
        except RequestRefused as error:
            if (
                "already been loaded" not in str(error)
                or (await self.listed()).get(version) != folder
            ):
                raise
        self.adapters[version] = folder

    async def unload(self, version: str) -> None:
        """Forget an adapter, once no open request names it. After this no replica's cache can ask
        for its files."""
        self.adapters.pop(version, None)
        while self.open[version]:
            await asyncio.sleep(0.02)
        del self.open[version]
        try:
            await self.request("POST", "/v1/unload_lora_adapter", {"lora_name": version})
        except RequestRefused as error:
            if error.status != 404 or version in await self.listed():
                raise

    async def close(self) -> None:
        if self._loop is asyncio.get_running_loop():
            await self._session.close()
        self._loop = None
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)

    # life and death

    async def _attach(self) -> None:
        """Connections, locks and tasks belong to one event loop; a caller may use several, one
        after the other."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None:
            with contextlib.suppress(
                RuntimeError
            ):  # the loop of its connections is closed and cannot say goodbye for them
                await self._session.close()
        self._loop = loop
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        self._lock = asyncio.Lock()
        self._inflight: set[asyncio.Task[Any]] = set()
        self._dropped: dict[asyncio.Task[Any], str] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def _watched(self, work: Coroutine[Any, Any, T]) -> T:
        """Await a request that the watch may drop; then it is `Transient`."""
        task = asyncio.ensure_future(work)
        self._inflight.add(task)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.ensure_future(self._watch())
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if task in self._dropped and me is not None and not me.cancelling():
                raise ConnectionDropped(self._dropped[task]) from None
            raise
        finally:
            self._inflight.discard(task)
            self._dropped.pop(task, None)
            if not self._inflight:
                self._watcher.cancel()

    async def _watch(self) -> None:
        """While requests are open: look for signs of life, and drop the requests of a server that
        has none."""
        clock = asyncio.get_running_loop().time
        seen, since = (-1, 0.0), clock()
        while True:
            await asyncio.sleep(min(self.patience.stall / 8, 5.0))
            if self.server is not None and not self.server.alive:
                return self._drop("its process ended")
            tokens = await self._generated()
            now = (self._finished, seen[1] if tokens is None else tokens)
            if now != seen:
                seen, since = now, clock()
            elif clock() - since >= self.patience.stall:
                reason = await self._probe()
                if reason:
                    waited = f"no request finished and no token came for {clock() - since:.0f} s"
                    return self._drop(
                        f"{waited}, then one token could not be generated either ({reason})"
                    )
                since = clock()

    async def _generated(self) -> float | None:
        """Tokens read and generated so far, over all requests; None if the server does not say."""
        try:
            text = await self._once("GET", "/metrics", None, min(self.patience.probe, 5.0))
        except (Transient, RequestRefused):
            return None
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(GROWTH)
        )

    async def _probe(self) -> str:
        """Why one token could not be generated; "" if it could. With an adapter if there is one:
        that is what must work."""
        model = next(reversed(self.adapters), self.base)
        body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0.0}
        try:
            await self._once("POST", "/v1/completions", body, self.patience.probe)
        except Transient as error:
            return str(error)
        except RequestRefused:
            return ""  # it took the trouble to say no
        return ""

    def _drop(self, reason: str) -> None:
        self._dead = reason
        for task in self._inflight:
            self._dropped[task] = reason
            task.cancel()

    async def _revive(self) -> None:
        """Before a try: start a dead server of ours again, once for all that wait. Raises
        `EngineError` when it may not be."""
        if not self.alone:
            if self._dead or (self.server is not None and not self.server.alive):
                raise ReplicaLost(
                    f"{self} is dead: {self._dead or 'its process ended'}{self._tail()}"
                )
            return
        async with self._lock:
            if self.server is None:
                self._dead = ""  # a server by URL may have come back; if not, this try says so
                return
            if self.server.alive and not self._dead:
                return
            await self._restart()
            for version, folder in self.adapters.items():
                await self.order(
                    "/v1/load_lora_adapter", {"lora_name": version, "lora_path": folder}
                )
            self._dead = ""

    async def _restart(self) -> None:
        """Start a dead server of ours again. Raises `EngineError` when it may not be."""
        assert self.server is not None
        self._dead = reason = self._dead or "its process ended"
        if self.restarts >= self.server.settings.max_restarts:
            raise EngineError(
                f"{self} is dead: {reason}; it was started again {self.restarts}"
                f" times{self._tail()}"
            )
        self.restarts += 1
        self.server.progress(
            f"{self} is dead: {reason}. Starting it again ({self.restarts})\n{self.server.tail()}"
        )
        await asyncio.to_thread(self.server.stop)
        self.server.launch()
        while not self.server.ready():
            await asyncio.sleep(0.25)
        self.url, self.key = self.server.url, self.server.key

    # coming back, one try each: `Transient` or `Refused` if it fails

    @property
    def comeback(self) -> float:
        """Seconds in which a lost server may be back."""
        return self.patience.gone + (
            self.server.settings.timeout if self.server is not None else 0.0
        )

    async def rise(self) -> None:
        """Let a lost server answer again: start it if it is ours and dead."""
        await self._attach()
        if self.server is not None and (self._dead or not self.server.alive):
            await self._restart()
        if self.key_file:  # a server that was started again has a new key
            self.key = await asyncio.to_thread(fresh_key, self.key_file)
        await self.look()
        self._dead = ""

    async def compute(self) -> None:
        """Let its base generate a token."""
        body = {"model": self.base, "prompt": [1], "max_tokens": 1, "temperature": 0.0}
        await self._once("POST", "/v1/completions", body, self.patience.probe)

    async def look(self) -> dict[str, str]:
        """What it lists: {version: folder}."""
        return loaded(await self._once("GET", "/v1/models", None, self.patience.probe))

    async def order(self, path: str, body: Any) -> None:
        await self._once("POST", path, body, 60.0)

    def _tail(self) -> str:
        return (
            f". End of {self.server.log}:\n{self.server.tail()}" if self.server is not None else ""
        )


def fresh_key(path: str) -> str:
    """The key that stands in the file now. `Transient` while there is none."""
    try:
        return read_key(path)
    except (
        OSError,
        ValueError,
    ) as error:  # the path was refused at start-up if it was none, see `secrecy`
        raise Transient(
            f"key file {path}: {error.strerror if isinstance(error, OSError) else error}"
        ) from error


def loaded(reply: Any) -> dict[str, str]:
    """The adapters in a reply to /v1/models: {version: folder}."""
    try:
        return {entry["id"]: entry["root"] for entry in reply["data"] if entry.get("parent")}
    except (KeyError, TypeError) as error:
        raise Transient(f"the list of models has no such form: {error!r}") from error


def message(raw: bytes) -> str:
    """The words in an error's body."""
    text = raw.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:1000]
    return text[:1000]
