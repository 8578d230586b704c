"""Several vLLM servers as one: a lost one is passed over, brought back with exactly the adapters it
should have, and used again.

A server of ours is started again; one by URL is asked until it answers. Meanwhile requests go to
the others, and versions are loaded and retired there. A server comes back only when it lists what
the others serve and has generated a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ....agents.types import nearest
from ..base import EngineError, ReplicaLost
from .client import Replica, RequestRefused, RetryPolicy
from .protocol import Transient
from .server import Progress, say

T = TypeVar("T")

# Where others can answer, waiting is worth less: gone or silent servers are passed over within half
# a minute.
HASTE = {"retries": 3, "stall": 15.0, "probe": 10.0}
PAUSES = (
    1.0,
    10.0,
)  # seconds between two looks at a lost server, doubled from the first to the last


def hasty(patience: RetryPolicy) -> RetryPolicy:
    """The patience with each of several servers: nowhere more than `HASTE`."""
    return replace(
        patience, **{name: min(getattr(patience, name), limit) for name, limit in HASTE.items()}
    )


class ReplicaPool:
    """The replicas by name, which of them are lost, and the adapters (version -> folder) that each
    should have.

    One replica is never passed over: it is waited for and started again where it stands.
    """

    def __init__(self, replicas: Mapping[str, Replica], progress: Progress = say) -> None:
        self.replicas, self.progress = dict(replicas), progress
        self.lost: dict[str, str] = {}  # name -> why
        self.adapters: dict[str, str] = {}
        self._returns: dict[str, asyncio.Task[None]] = {}
        self._hopeless: set[str] = set()
        for replica in self.replicas.values():
            replica.alone = len(self.replicas) == 1

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
                return await work(replica)
            except ReplicaLost as error:
                self.lose(replica, str(error))

    async def everywhere(self, work: Callable[[Replica], Awaitable[None]]) -> None:
        """`work` on every replica present; those that get lost over it are brought up to date when
        they return."""

        async def one(replica: Replica) -> None:
            try:
                await work(replica)
            except ReplicaLost as error:
                self.lose(replica, str(error))

        await asyncio.gather(*(one(replica) for replica in (await self._some()).values()))
        await self._some()

    async def load(self, version: str, folder: Path) -> None:
        self.adapters[version] = str(folder)
        await self.everywhere(lambda replica: replica.load(version, str(folder)))

    async def unload(self, version: str) -> None:
        """Forget a version everywhere, once no open request names it."""
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
            try:
                listed = await replica.listed()
            except ReplicaLost as error:
                return self.lose(replica, str(error))
            if listed != self.adapters:
                self.lose(
                    replica,
                    f"it lists {len(listed)} adapters, not the {len(self.adapters)} that it should",
                )

        await asyncio.gather(*(one(replica) for replica in self.present.values()))
        await self._some()
        coming = [
            task for name, task in self._returns.items() if name in self.lost and not task.done()
        ]
        if coming:
            await asyncio.wait(coming, timeout=PAUSES[1])

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

    # coming back

    async def _some(self) -> dict[str, Replica]:
        """Those present, once there are any. Starts to bring the lost ones back."""
        here = asyncio.get_running_loop()
        for name in self.lost.keys() - self._hopeless:
            task = self._returns.get(name)
            if task is None or task.done() or task.get_loop() is not here:
                self._returns[name] = asyncio.create_task(self._return(self.replicas[name]))
        if not self.present:
            coming = [
                task
                for name, task in self._returns.items()
                if name in self.lost and not task.done()
            ]
            patience = max(replica.comeback for replica in self.replicas.values())
            if coming:
                await asyncio.wait(coming, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not self.present:
                why = "; ".join(
                    f"{self.replicas[name]}: {reason}" for name, reason in self.lost.items()
                )
                raise EngineError(f"all {len(self.replicas)} servers are gone ({why})")
        return self.present

    async def _return(self, replica: Replica) -> None:
        pause, longest = PAUSES
        while True:
            try:
                await replica.rise()
                await self._equip(replica)
            except (Transient, RequestRefused) as error:
                self.lost[replica.name] = str(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
            except EngineError as error:  # ours, and started too often
                self._hopeless.add(replica.name)
                self.lost[replica.name] = str(error)
                self.progress(f"{replica} is given up: {error}")
                return
            else:
                del self.lost[replica.name]
                self.progress(f"{replica} is back with {len(self.adapters)} adapters")
                return

    async def _equip(self, replica: Replica) -> None:
        """Until it lists exactly what it should. Raises `Transient` where it fails; nothing is
        awaited after the last look."""
        await replica.compute()
        while (listed := await replica.look()) != self.adapters:
            for version in listed:
                if listed[version] != self.adapters.get(version):
                    await replica.order("/v1/unload_lora_adapter", {"lora_name": version})
            for version, folder in list(self.adapters.items()):
                if listed.get(version) != folder:
                    await replica.order(
                        "/v1/load_lora_adapter", {"lora_name": version, "lora_path": folder}
                    )
        replica.adapters = dict(self.adapters)
