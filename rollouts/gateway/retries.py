"""Calls of a program that are open or answered, and which request only sends one of them again.

OpenAI clients resend a request when a connection breaks or a reply is late. A request that is sent
again must get the answer of the first, not a second sample, or one turn would be recorded twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ...agents.types import Turn
from .api.chat import Request
from .api.fields import BadRequest


class Connection(Protocol):
    """An open HTTP request, as far as needed here: whether its client is still connected."""

    @property
    def transport(self) -> asyncio.Transport | None: ...


@dataclass(eq=False)
class PendingCall:
    """A call and its answer, shared by all requests that send it. `body` is a hash of the request,
    `key` its Idempotency-Key, `connections` those that wait for the answer."""

    body: str
    key: str
    request: Request
    answer: asyncio.Task[tuple[Turn, ...]]
    created: int = field(default_factory=lambda: int(time.time()))
    delivered: bool = False
    connections: list[Connection] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.answer.done() and (
            self.answer.cancelled() or self.answer.exception() is not None
        )

    def deliver(self) -> None:
        """Its answer was sent. Its connections are let go: an open HTTP request is dozens of
        objects, which every full garbage collection in the episode would visit."""
        self.delivered = True
        self.connections.clear()

    @property
    def abandoned(self) -> bool:
        """Every connection that asked for it broke before the reply was sent."""
        return not self.delivered and all(disconnected(each) for each in self.connections)


def disconnected(connection: Connection) -> bool:
    """Whether the client of a request has gone."""
    return connection.transport is None or connection.transport.is_closing()


def request_hash(path: str, body: bytes) -> str:
    """Hash of a request's path and body, by which a request that is sent again is recognised: byte
    for byte, as clients send it."""
    return hashlib.sha256(path.encode() + b"\0" + body).hexdigest()


class RetryCache:
    """The calls of one episode, in the order in which they arrived."""

    def __init__(self) -> None:
        self._calls: list[PendingCall] = []

    def __iter__(self) -> Iterator[PendingCall]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: PendingCall) -> None:
        """Remember a new call."""
        self._calls.append(call)

    def find(self, body: str, key: str, retries: int | None) -> PendingCall | None:
        """The earlier call that a request sends again; None for a new call.

        A request is sent again if it has the `key` of an earlier one; if its body is equal and it
        declares itself a retry (`retries` > 0); if its body is equal and the earlier one's
        connection broke before its reply was sent; or if its body is equal, the earlier one is
        open and the request does not declare itself new (`retries` 0).

        Args:
            body: `request_hash` of the request.
            key: its Idempotency-Key; "" if it has none.
            retries: its X-Stainless-Retry-Count; None if it has none.
        """
        for call in reversed(self._calls):
            if key and call.key == key and not call.failed:
                if call.body != body:
                    raise BadRequest(
                        422,
                        f"Idempotency-Key {key[:40]!r} was used for another request",
                        "idempotency_error",
                    )
                return call
        for call in reversed(self._calls):
            if call.body != body or call.failed or (key and call.key):
                continue
            again = bool(retries) or call.abandoned or (retries is None and not call.answer.done())
            if again:
                return call
        return None
