"""Several vLLM servers as one: a lost replica is passed over, brought back with exactly the
adapters it should have, and used again.

A server that was started here is started again; one by URL is asked until it answers, at the
address that the files of its key and URL have then. Meanwhile requests go to the others, and
versions are loaded and retired there. A replica comes back only when it lists what the others serve
and has generated a token.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ....agents.types import nearest
from ...http import Transient, retry
from ..base import EngineError, ReplicaLost
from .client import ReplicaClient, RequestRefused, adapters_of
from .health import ReplicaHealth, ReplicaPolicy
from .server import Progress, VLLMServer, say

T = TypeVar("T")

# Limits where other servers can answer: lost or silent ones are passed over within half a minute.
CAPS = {"retries": 3, "stall": 15.0, "probe": 10.0}
# seconds between two looks at a lost server, doubled from the first to the last
PAUSES = (1.0, 10.0)


def capped(policy: ReplicaPolicy) -> ReplicaPolicy:
    """The policy for each of several servers: nowhere more than `CAPS`."""
    return replace(
        policy, **{name: min(getattr(policy, name), limit) for name, limit in CAPS.items()}
    )


class Replica:
    """One server: requests with retries, and its adapters.

    `open` counts requests in flight by served name.
    """

    def __init__(
        self, client: ReplicaClient, policy: ReplicaPolicy, server: VLLMServer | None = None
    ) -> None:
        self.client, self.policy, self.server = client, policy, server
        self.health = ReplicaHealth(client, policy, server)
        self.open: Counter[str] = Counter()

    def __str__(self) -> str:
        return str(self.client)

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def base(self) -> str:
        return self.client.base

    @property
    def adapters(self) -> dict[str, str]:
        """Version -> folder, as they should be loaded."""
        return self.health.adapters

    async def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        read: Callable[[Any], T] = lambda reply: reply,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send, and `read` the reply (may raise `Transient`).

        Raises `RequestRefused` for a 4xx, after the last try `EngineError`, or `ReplicaLost` if
        there are other replicas.
        """
        await self.health.attach()

        async def attempt() -> T:
            await self.health.revive()
            return await self.health.watched(
                self.client.send(
                    method, path, body, seconds=self.policy.request, read=read, headers=headers
                )
            )

        try:
            return await retry(self.policy, attempt, self.health.final)
        except Transient as error:
            kind = EngineError if self.health.alone else ReplicaLost
            raise kind(
                f"{self}: {method} {path} failed {error.tries} times, last:"
                f" {error}{self.health.log_tail}"
            ) from error

    async def listed(self) -> dict[str, str]:
        """The adapters that the server lists: {version: folder}."""
        return await self.request("GET", "/v1/models", read=adapters_of)

    async def load(self, version: str, folder: str) -> None:
        """Load an adapter. One that a lost reply had loaded from this folder counts as loaded."""
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
        """Unload an adapter, once no open request names it. After this the server's cache asks for
        its files no more."""
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
        await self.client.close()
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)


class ReplicaPool:
    """The replicas by name, which of them are lost, and the adapters (version -> folder) that each
    should have.

    A single replica is never passed over: requests wait for it while it is started again.

    Args:
        asked: given where another process starts the servers again, loads and unloads: the versions
            that requests need now. A replica, a single one too, comes back when it lists these.
    """

    def __init__(
        self,
        replicas: Mapping[str, Replica],
        progress: Progress = say,
        *,
        asked: Callable[[], set[str]] | None = None,
    ) -> None:
        self.replicas, self.progress, self.asked = dict(replicas), progress, asked
        self.lost: dict[str, str] = {}  # name -> why
        self.adapters: dict[str, str] = {}
        self._returns: dict[str, asyncio.Task[None]] = {}
        self._given_up: set[str] = set()
        for replica in self.replicas.values():
            replica.health.alone = len(self.replicas) == 1 and asked is None

    @property
    def present(self) -> dict[str, Replica]:
        """Those that can be asked now."""
        return {name: replica for name, replica in self.replicas.items() if name not in self.lost}

    async def ask(
        self,
        choose: Callable[[Mapping[str, Replica]], Replica],
        work: Callable[[Replica], Awaitable[T]],
    ) -> T:
        """`work` on a replica that `choose` picks among those present, and on another one whenever
        that is lost.

        Raises `EngineError` when all are gone.
        """
        while True:
            replica = choose(await self._some())
            try:
                try:
                    return await work(replica)
                except RequestRefused as error:
                    if not await self._started_anew(replica, error):
                        raise
                    raise ReplicaLost(f"{replica} was started again: {error}") from error
            except ReplicaLost as error:
                self.lose(replica, str(error))

    async def _started_anew(self, replica: Replica, refusal: RequestRefused) -> bool:
        """Does another process's server refuse a request because it has been started again, and has
        a new key (401) or not all adapters yet (404)?"""
        if self.asked is None or refusal.status not in (401, 404):
            return False
        return refusal.status == 401 or not self._whole(await replica.listed())

    def _whole(self, listed: Mapping[str, str]) -> bool:
        """Are these adapters all that a replica should list?"""
        return listed == self.adapters if self.asked is None else self.asked() <= listed.keys()

    async def revive(self) -> None:
        """Start again those of our servers whose process has ended, though nobody asks them here:
        only other processes may be asking."""
        dead = [r for r in self.present.values() if r.server is not None and not r.server.alive]
        await self._each(dead, _list)
        if dead:
            await self._some()

    async def everywhere(self, work: Callable[[Replica], Awaitable[None]]) -> None:
        """`work` on every replica present; those that get lost over it are brought up to date when
        they return."""
        await self._each((await self._some()).values(), work)
        await self._some()

    async def _each(
        self, replicas: Iterable[Replica], work: Callable[[Replica], Awaitable[None]]
    ) -> None:
        async def one(replica: Replica) -> None:
            try:
                await work(replica)
            except ReplicaLost as error:
                self.lose(replica, str(error))

        await asyncio.gather(*(one(replica) for replica in replicas))

    async def load(self, version: str, folder: Path) -> None:
        self.adapters[version] = str(folder)
        await self.everywhere(lambda replica: replica.load(version, str(folder)))

    async def unload(self, version: str) -> None:
        """Unload a version everywhere, once no open request names it."""
        self.adapters.pop(version, None)
        await self.everywhere(lambda replica: replica.unload(version))

    async def only(self, name: str, work: Callable[[Replica], Awaitable[T]]) -> T:
        """`work` on this replica and no other. Raises `ReplicaLost` if it is not there now."""
        if name not in self.replicas:
            raise EngineError(f"unknown replica {name!r}; {nearest(name, self.replicas)}")
        if name in self.lost:
            raise ReplicaLost(f"{self.replicas[name]} is lost: {self.lost[name]}")
        try:
            return await work(self.replicas[name])
        except ReplicaLost as error:
            self.lose(self.replicas[name], str(error))
            raise

    def lose(self, replica: Replica, why: str) -> None:
        if replica.name not in self.lost:
            self.progress(
                f"{replica} is lost, {len(self.present) - 1} of {len(self.replicas)} servers go on:"
                f" {why}"
            )
            self.lost[replica.name] = why

    async def inspect(self) -> None:
        """Look at every replica; those that do not list what they should are lost until they do.
        Waits for them a while."""

        async def one(replica: Replica) -> None:
            listed = await replica.listed()
            if not self._whole(listed):
                should = self.adapters if self.asked is None else self.asked()
                self.lose(
                    replica,
                    f"it lists {len(listed)} adapters, not the {len(should)} that it should",
                )

        await self._each(self.present.values(), one)
        await self._some()
        returning = self._returning()
        if returning:
            await asyncio.wait(returning, timeout=PAUSES[1])

    async def forget(self, root: Path) -> None:
        """Unload what an earlier process has left loaded from this folder."""

        async def one(replica: Replica) -> None:
            for version, folder in (await replica.listed()).items():
                if Path(folder).parent == root and version not in self.adapters:
                    await replica.unload(version)

        await self.everywhere(one)

    async def close(self) -> None:
        tasks = [
            task for task in self._returns.values() if task.get_loop() is asyncio.get_running_loop()
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in self.replicas.values()))

    # the return of lost replicas

    def _returning(self) -> list[asyncio.Task[None]]:
        return [
            task for name, task in self._returns.items() if name in self.lost and not task.done()
        ]

    async def _some(self) -> dict[str, Replica]:
        """Those present, once there are any. Starts to bring the lost ones back."""
        here = asyncio.get_running_loop()
        for name in self.lost.keys() - self._given_up:
            task = self._returns.get(name)
            if task is None or task.done() or task.get_loop() is not here:
                self._returns[name] = asyncio.create_task(self._return(self.replicas[name]))
        if not self.present:
            returning = self._returning()
            limit = max(replica.health.comeback for replica in self.replicas.values())
            if returning:
                await asyncio.wait(returning, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not self.present:
                why = "; ".join(
                    f"{self.replicas[name]}: {reason}" for name, reason in self.lost.items()
                )
                raise EngineError(f"all {len(self.replicas)} servers are gone ({why})")
        return self.present

    async def _return(self, replica: Replica) -> None:
        """Until the replica is back, or may not be started again."""
        pause, longest = PAUSES
        while True:
            try:
                await replica.health.rise()
                if self.asked is None:
                    await replica.health.equip(self.adapters)
                else:
                    await replica.health.expect(self.asked)
            except (Transient, RequestRefused) as error:
                self.lost[replica.name] = str(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            except EngineError as error:  # started too often
                self._given_up.add(replica.name)
                self.lost[replica.name] = str(error)
                self.progress(f"{replica} is given up: {error}")
                return
            else:
                del self.lost[replica.name]
                self.progress(f"{replica} is back with {len(replica.adapters)} adapters")
                return


async def _list(replica: Replica) -> None:
    await replica.listed()
