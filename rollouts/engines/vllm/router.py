"""A router in front of many servers, for generation alone: vllm-router or anything that keeps the
requests of one `X-Session-ID` together.

A router spreads chats over servers that it looks after itself, and hashes a chat's id so that it
stays where its prefix is cached. It knows nothing of adapters: they are published to every server
behind it and proven there, one by one, past the router (`ReplicaPool`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .client import Replica, RequestRefused, RetryPolicy
from .replicas import ReplicaPool

T = TypeVar("T")

SESSION = "X-Session-ID"  # what vllm-router's policy `consistent_hash` looks at first


class Router:
    """Where requests go whose place does not matter.

    Args:
        url, key: of the router, which hands the key on: all servers behind it take the same.
        base: name under which they serve the base.
        fleet: the servers behind it.
    """

    def __init__(
        self, url: str, key: str, base: str, fleet: ReplicaPool, patience: RetryPolicy
    ) -> None:
        self.fleet, self.base, self.patience = fleet, base, patience
        self._front = Replica(url, url, key, base, patience)
        self.open: Counter[str] = Counter()  # requests in flight by served name

    async def complete(self, chat: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """The reply to a completion of this chat.

        A server that has lost its adapters (it was started again) says that there is no such model:
        then all servers are looked at, those that do not list what they should get it again, and
        the request is sent again. Raises `EngineError` after the last try.
        """
        model = str(body["model"])
        self.open[model] += 1
        try:
            for _ in range(self.patience.retries):
                try:
                    return await self._front.request(
                        "POST", "/v1/completions", body, read, {SESSION: chat}
                    )
                except RequestRefused as error:
                    if error.status != 404 or model not in self.fleet.adapters:
                        raise
                    await self.fleet.inspect()
            return await self._front.request("POST", "/v1/completions", body, read, {SESSION: chat})
        finally:
            self.open[model] -= 1

    async def idle(self, version: str) -> None:
        """Until no open request names this version."""
        while self.open[version]:
            await asyncio.sleep(0.02)
        del self.open[version]

    async def close(self) -> None:
        await self._front.close()
