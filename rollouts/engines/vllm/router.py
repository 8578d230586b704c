"""Routing of chats over several servers: our own choice of a replica (`Routes`), or a router in
front of the servers, for generation alone (`Router`): vllm-router, or any that keeps the requests
of one `X-Session-ID` together.

A router spreads chats over the servers that it watches itself, and hashes a chat's id so that it
stays where its prefix is cached. It knows nothing of adapters: they are published to every server
behind it and verified there, one by one, past the router (`ReplicaPool`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from .client import ReplicaClient, RequestRefused
from .health import ReplicaPolicy
from .replicas import Replica, ReplicaPool

T = TypeVar("T")

CHATS = 4096  # prompts whose replica is remembered
SESSION = "X-Session-ID"  # the field that vllm-router's `consistent_hash` reads first


class Routes:
    """Prefix-aware routing: a chat stays on the replica where its prefix is cached.

    A chat's next prompt begins with its last one (design: chats grow by appending), so a prompt
    goes where the longest prompt that it extends went, for the same policy. Prompts that extend
    none go to the replica with the fewest open requests. Whole earlier prompts are compared, not
    first tokens: few-shot prompts share those across all chats.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], str] = OrderedDict()

    def choose(self, policy: str, ids: Sequence[int], open_requests: Mapping[str, int]) -> str:
        """The name of a replica, of those in `open_requests` (name -> requests in flight)."""
        if len(open_requests) == 1:
            return next(iter(open_requests))
        earlier, last = self._earlier(policy, ids)
        name = (
            earlier
            if earlier is not None and earlier in open_requests
            else min(open_requests, key=lambda one: open_requests[one])
        )
        return self._remember(policy, last, name)

    def chat(self, policy: str, ids: Sequence[int]) -> str:
        """The chat's id: its first prompt's hash, the same in every process. Chats that begin alike
        share one, as they share a prefix."""
        earlier, last = self._earlier(policy, ids)
        return self._remember(policy, last, earlier or f"{policy}-{last % 2**64:016x}")

    def _earlier(self, policy: str, ids: Sequence[int]) -> tuple[str | None, int]:
        """Where the longest prompt that this one extends went, and this one's hash."""
        hashes = list(accumulate(ids, lambda seen, token: hash((seen, token)), initial=0))[1:]
        return (
            next(
                (self._seen[policy, h] for h in reversed(hashes) if (policy, h) in self._seen), None
            ),
            hashes[-1],
        )

    def _remember(self, policy: str, last: int, place: str) -> str:
        self._seen[policy, last] = place
        self._seen.move_to_end((policy, last))
        if len(self._seen) > CHATS:
            self._seen.popitem(last=False)
        return place


class Router:
    """The router that is asked to generate, and the servers behind it.

    Args:
        url, key: of the router, which hands the key on: all servers behind it take the same.
        base: name under which they serve the base.
        fleet: the servers behind it.
    """

    def __init__(
        self, url: str, key: str, base: str, fleet: ReplicaPool, policy: ReplicaPolicy
    ) -> None:
        self.fleet, self.base, self.policy = fleet, base, policy
        self.url = url
        self._front = Replica(ReplicaClient(url, url, key, base), policy)

    async def complete(self, chat: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """The reply to a completion of this chat.

        A server that has lost its adapters (it was started again) answers 404 for the model: then
        all servers are inspected, those that do not list what they should get it again, here or
        from the process that publishes, and the request is sent again. Raises `EngineError` after
        the last try.
        """
        for _ in range(self.policy.retries):
            try:
                return await self._send(chat, body, read)
            except RequestRefused as error:
                asked = self.fleet.adapters if self.fleet.asked is None else self.fleet.asked()
                if error.status != 404 or str(body["model"]) not in asked:
                    raise
                await self.fleet.inspect()
        return await self._send(chat, body, read)

    async def _send(self, chat: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        return await self._front.request("POST", "/v1/completions", body, read, {SESSION: chat})

    async def close(self) -> None:
        await self._front.close()
