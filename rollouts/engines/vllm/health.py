"""Health of one vLLM server: a watchdog while requests are open, and restarts of a dead server.

`/health` says that a server's front answers, not that its engine computes. A replica counts as dead
when its process has ended, or when for `stall` seconds no request finished and no token was
generated although requests were open, and it then cannot generate one token. A dead server that was
started here is started again (at most `max_restarts` times) and loads its adapters again; requests
that were open are sent again with their seeds, so the result is the one they would have had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...http import RetryPolicy, Transient
from ..base import EngineError, ReplicaLost
from .client import ReplicaClient, RequestRefused
from .server import VLLMServer

T = TypeVar("T")


@dataclass(frozen=True)
class ReplicaPolicy(RetryPolicy):
    """Retries and health limits of a server, in counts and seconds.

    Where there are several servers, `replicas.capped` shortens them.

    Args:
        stall: so long without a finished request or a token is followed by a probe, which may take
            `probe`.
        gone: when all of several servers are lost, one may take this long to come back (one that
            was started here: besides the time it may take to start).
    """

    stall: float = 120.0
    probe: float = 30.0
    gone: float = 60.0


class ConnectionDropped(Transient):
    """The watchdog gave the server up while this request was open."""


class ReplicaHealth:
    """Watchdog and restarts of one server.

    `server` is None for a server that is given by URL: it cannot be started again from here.
    `adapters` (version -> folder) are loaded again after a restart. `alone`: there is no other
    replica and nobody else starts it again, so requests wait while it is; else they raise
    `ReplicaLost`, and `ReplicaPool` brings it back.
    """

    def __init__(
        self, client: ReplicaClient, policy: ReplicaPolicy, server: VLLMServer | None = None
    ) -> None:
        self.client, self.policy, self.server = client, policy, server
        self.adapters: dict[str, str] = {}
        self.alone = True
        self.restarts = 0
        self._dead = ""  # why the watchdog gave the server up
        self._finished = 0  # requests

    async def attach(self) -> None:
        """Locks and tasks belong to one event loop: new ones when it is another than before."""
        if await self.client.attach():
            self._lock = asyncio.Lock()
            self._inflight: set[asyncio.Task[Any]] = set()
            self._dropped: dict[asyncio.Task[Any], str] = {}
            self._watchdog: asyncio.Task[None] | None = None

    @property
    def log_tail(self) -> str:
        """The end of the server's log, as the end of an error."""
        if self.server is None:
            return ""
        return f". End of {self.server.log}:\n{self.server.tail()}"

    @property
    def comeback(self) -> float:
        """Seconds in which a lost server may be back."""
        start = self.server.settings.timeout if self.server is not None else 0.0
        return self.policy.gone + start

    # while requests are open

    async def watched(self, request: Coroutine[Any, Any, T]) -> T:
        """Await a request; raises `ConnectionDropped` if the watchdog cancels it."""
        task = asyncio.ensure_future(request)
        self._inflight.add(task)
        if self._watchdog is None or self._watchdog.done():
            self._watchdog = asyncio.ensure_future(self._watch())
        try:
            reply = await task
            self._finished += 1
            return reply
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if task in self._dropped and me is not None and not me.cancelling():
                raise ConnectionDropped(self._dropped[task]) from None
            raise
        finally:
            self._inflight.discard(task)
            self._dropped.pop(task, None)
            if not self._inflight:
                self._watchdog.cancel()

    async def _watch(self) -> None:
        """Look for progress; cancel the requests of a server that makes none."""
        clock = asyncio.get_running_loop().time
        seen, since = (-1, 0.0), clock()
        while True:
            await asyncio.sleep(min(self.policy.stall / 8, 5.0))
            if self.server is not None and not self.server.alive:
                return self._drop("its process ended")
            tokens = await self.client.token_count(min(self.policy.probe, 5.0))
            now = (self._finished, seen[1] if tokens is None else tokens)
            if now != seen:
                seen, since = now, clock()
            elif clock() - since >= self.policy.stall:
                reason = await self._probe()
                if reason:
                    waited = f"no request finished and no token came for {clock() - since:.0f} s"
                    return self._drop(
                        f"{waited}, then one token could not be generated either ({reason})"
                    )
                since = clock()

    async def _probe(self) -> str:
        """Why one token could not be generated; "" if it could. With an adapter if there is one:
        that is what must work."""
        model = next(reversed(self.adapters), self.client.base)
        try:
            await self.client.generate_one(model, self.policy.probe)
        except Transient as error:
            return str(error)
        except RequestRefused:
            return ""  # a refusal is an answer too
        return ""

    def _drop(self, reason: str) -> None:
        self._dead = reason
        for task in self._inflight:
            self._dropped[task] = reason
            task.cancel()

    # restarts

    def final(self, error: Transient) -> bool:
        """Is a retry of no use: dropped by the watchdog, and not to be started again here?"""
        return isinstance(error, ConnectionDropped) and (self.server is None or not self.alone)

    async def revive(self) -> None:
        """Before a try: start a dead server again, once for all requests that wait for it.

        Raises `EngineError` when it was restarted too often, `ReplicaLost` if it is not alone.
        """
        if not self.alone:
            if self._dead or (self.server is not None and not self.server.alive):
                reason = self._dead or "its process ended"
                raise ReplicaLost(f"{self.client} is dead: {reason}{self.log_tail}")
            return
        async with self._lock:
            if self.server is None:
                self._dead = ""  # a server by URL may have come back; if not, this try fails too
                return
            if self.server.alive and not self._dead:
                return
            await self._restart(self.server)
            for version, folder in self.adapters.items():
                await self.client.load(version, folder)
            self._dead = ""

    async def _restart(self, server: VLLMServer) -> None:
        self._dead = reason = self._dead or "its process ended"
        if self.restarts >= server.settings.max_restarts:
            raise EngineError(
                f"{self.client} is dead: {reason}; it was started again {self.restarts}"
                f" times{self.log_tail}"
            )
        self.restarts += 1
        server.progress(
            f"{self.client} is dead: {reason}. Starting it again ({self.restarts})\n{server.tail()}"
        )
        await asyncio.to_thread(server.stop)
        server.launch()
        while not server.ready():
            await asyncio.sleep(0.25)
        self.client.url, self.client.key = server.url, server.key

    # the return of a lost replica, one try each: `Transient` or `RequestRefused` if it fails

    async def rise(self) -> None:
        """Let a lost server answer again: start it if it is dead and was started here."""
        await self.attach()
        if self.server is not None and (self._dead or not self.server.alive):
            await self._restart(self.server)
        await self.client.read_address()
        await self.client.adapters(self.policy.probe)
        self._dead = ""

    async def expect(self, versions: Callable[[], Iterable[str]]) -> None:
        """Raises `Transient` unless the server generates a token and lists these versions, which
        another process loads."""
        await self.client.generate_one(self.client.base, self.policy.probe)
        listed = await self.client.adapters(self.policy.probe)
        missing = set(versions()) - listed.keys()
        if missing:
            raise Transient(f"{self.client} does not list {', '.join(sorted(missing))} again yet")

    async def equip(self, adapters: Mapping[str, str]) -> None:
        """Load and unload until the server lists exactly `adapters` (version -> folder), which may
        change meanwhile. Nothing is awaited after the last look."""
        await self.client.generate_one(self.client.base, self.policy.probe)
        while (listed := await self.client.adapters(self.policy.probe)) != adapters:
            for version in listed:
                if listed[version] != adapters.get(version):
                    await self.client.unload(version)
            for version, folder in list(adapters.items()):
                if listed.get(version) != folder:
                    await self.client.load(version, folder)
        self.adapters = dict(adapters)
