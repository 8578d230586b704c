"""Commands that play many tasks each, so that a program that takes seconds to import is started a
few times, not once per episode.

    system: {class: "marlora.rollouts.gateway.workers:Workers", agents: [solver, critic],
        command: [python, my_worker.py], workers: 4}
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass
from typing import Any

from ...agents.team import Team
from ...agents.types import SettingError, Task
from .process import ProgramError, WorkerProcess
from .programs import Command, public
from .session import Session


@dataclass
class Workers(Command):
    """A command in a few long-lived processes, each with one task at a time.

    It reads a line of JSON from stdin per task, `{"task": {...}, "base_url": ..., "api_key": ...,
    "episode": ...}` (the task has no answer), asks the agents at that address with that key, and
    writes one line of JSON to stdout: `{"output": ...}`, perhaps with a `reward`, or `{"error":
    ...}` for a failed episode. Other lines are passed over. It ends when stdin does.

    A process lives as long as any episode is played: over a step's episodes, not over the update
    after it. One that ends, or is not done in `timeout` seconds, fails its episode alone, and the
    next one gets a new process.

    Args:
        workers: processes at most; an episode waits for one that is free.
        memory, cpu_seconds: of a process over its whole life.
    """

    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        if type(self.workers) is not int or self.workers < 1:
            raise SettingError(
                f"workers: expected a whole number of at least 1, got {self.workers!r}"
            )

    async def run(self, task: Task, team: Team) -> str:
        loop = asyncio.get_running_loop()
        pool = self._pools.setdefault(loop, Pool(self))
        pool.episodes += 1
        try:
            return await super().run(task, team)
        finally:
            pool.episodes -= 1
            if not pool.episodes:
                del self._pools[loop]
                await pool.close()

    async def play(self, task: Task, session: Session) -> Any:
        order = {
            "task": public(task),
            "base_url": session.base_url,
            "api_key": session.key,
            "episode": session.id,
        }
        result = await self._pools[asyncio.get_running_loop()].result(order)
        if "error" in result:
            raise ProgramError(str(result["error"])[:2000])
        return result


class Pool:
    """The processes of one event loop; `episodes`: those that may ask."""

    def __init__(self, system: Workers) -> None:
        self.system, self.episodes = system, 0
        self._free: list[tuple[WorkerProcess, contextlib.AsyncExitStack]] = []
        self._room = asyncio.Semaphore(system.workers)

    async def result(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a free process says of a task; a process that fails, or whose episode is called off,
        is ended."""
        async with self._room:
            worker, held = self._free.pop() if self._free else await self._start()
            try:
                result = await worker.result(order)
            except BaseException:
                await held.aclose()
                raise
            self._free.append((worker, held))
            return result

    async def _start(self) -> tuple[WorkerProcess, contextlib.AsyncExitStack]:
        system, held = self.system, contextlib.AsyncExitStack()
        scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="marlora-program-"))
        worker = WorkerProcess(
            list(system.command), system.passed_on(scratch), system.folder or None, system.bounds
        )
        try:
            return await held.enter_async_context(worker), held
        except BaseException:
            await held.aclose()
            raise

    async def close(self) -> None:
        """End all processes; none is at work."""
        while self._free:
            _, held = self._free.pop()
            await held.aclose()
