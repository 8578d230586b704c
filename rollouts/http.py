"""HTTP client of vLLM servers and of API models: one session, one retry policy (aiohttp).

`send` is one try, `retry` repeats a try as a `RetryPolicy` says, `fetch` is one blocking request
for checks at start-up. Errors that may pass (429, 5xx, time-outs, lost connections) are
`Transient`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

_JITTER = random.Random()  # not the global generator: retries must not change what is sampled


class Transient(RuntimeError):
    """This try failed; the same request may work when it is sent again."""

    tries = 1  # how many of them failed, set by `retry`


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when a request is sent again, in counts and seconds.

    Args:
        retries: after the first try.
        backoff: before the first retry; doubled each time, at most `longest`.
        jitter: each pause is multiplied by a random factor between these two.
        request: one try may take this long.
    """

    retries: int = 6
    backoff: float = 0.5
    longest: float = 10.0
    request: float = 1800.0
    jitter: tuple[float, float] = (0.5, 1.5)

    def pause(self, number: int) -> float:
        """Seconds before retry `number`, counted from 1."""
        return min(self.backoff * 2 ** (number - 1), self.longest) * _JITTER.uniform(*self.jitter)


@dataclass(frozen=True)
class Response:
    """A reply that was read whole."""

    status: int
    body: bytes
    encoding: str = "utf-8"

    @property
    def text(self) -> str:
        return self.body.decode(self.encoding, "replace")

    @property
    def may_pass(self) -> bool:
        """Is it an error that a later try may not have?"""
        return self.status == 429 or self.status >= 500


def open_session() -> aiohttp.ClientSession:
    """An HTTP session of the running event loop: connections without limit, no proxy."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    return aiohttp.ClientSession(connector=connector, trust_env=False)


async def send(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    read: Callable[[Response], T],
    *,
    body: Any = None,
    key: str = "",
    headers: Mapping[str, str] | None = None,
    seconds: float,
) -> T:
    """One try: `body` as JSON, `key` as bearer token, the reply given to `read`.

    Where `read` raises, the connection is closed: what comes on it next may belong to another
    request. Raises `Transient` for a time-out or lost connection, `aiohttp.InvalidURL` as it is.
    """
    fields = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}
    timeout = aiohttp.ClientTimeout(total=seconds)
    try:
        async with session.request(
            method, url, json=body, headers=fields, timeout=timeout
        ) as response:
            try:
                content = await response.read()
                return read(Response(response.status, content, response.get_encoding()))
            except BaseException:
                response.close()
                raise
    except aiohttp.InvalidURL:
        raise
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        problem = error or f"no answer for {seconds:.0f} s"
        raise Transient(f"{type(error).__name__}: {problem}") from error


async def retry(
    policy: RetryPolicy,
    attempt: Callable[[], Awaitable[T]],
    final: Callable[[Transient], bool] = lambda error: False,
) -> T:
    """The result of `attempt`, which is called again after `Transient` unless that is `final`.

    Raises the last `Transient`, with `tries` set.
    """
    number = 0
    while True:
        try:
            return await attempt()
        except Transient as error:
            number += 1
            error.tries = number
            if number > policy.retries or final(error):
                raise
        await asyncio.sleep(policy.pause(number))


def fetch(
    url: str, key: str = "", method: str = "GET", body: Any = None, timeout: float = 10.0
) -> tuple[int, bytes]:
    """One blocking request without retries: (status, body). Also where an event loop runs already.

    Raises `OSError` if there is no answer.
    """

    async def work() -> tuple[int, bytes]:
        async with open_session() as session:
            return await send(
                session, method, url, _status_and_body, body=body, key=key, seconds=timeout
            )

    try:
        if not _in_event_loop():
            return asyncio.run(work())
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, work()).result()
    except Transient as error:
        raise ConnectionError(str(error)) from error


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _status_and_body(response: Response) -> tuple[int, bytes]:
    return response.status, response.body
