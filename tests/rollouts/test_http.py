"""The HTTP client: how often a request is sent again, how long it waits, and what ends it."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from marlora.rollouts.http import RetryPolicy, Transient, fetch, open_session, retry, send
from tests.rollouts.fake_vllm import FakeVLLM

FAST = RetryPolicy(retries=2, backoff=0.001, longest=0.002)


def tries(failures: int, policy: RetryPolicy, last: str = "none is final") -> tuple[str, int]:
    """(result or last error, number of tries) of an attempt that fails so often."""
    calls: list[int] = []

    async def attempt() -> str:
        calls.append(len(calls) + 1)
        if len(calls) <= failures:
            raise Transient(f"failure {len(calls)}")
        return "done"

    try:
        result = asyncio.run(retry(policy, attempt, lambda error: str(error) == last))
    except Transient as error:
        assert error.tries == len(calls)
        return str(error), len(calls)
    return result, len(calls)


def test_a_try_is_repeated_as_often_as_the_policy_allows() -> None:
    assert tries(0, FAST) == ("done", 1)
    assert tries(2, FAST) == ("done", 3)
    assert tries(3, FAST) == ("failure 3", 3)
    assert tries(3, FAST, last="failure 1") == ("failure 1", 1)


def test_pauses_double_up_to_the_longest_and_are_jittered() -> None:
    policy = RetryPolicy(backoff=1.0, longest=4.0, jitter=(0.5, 1.5))
    for number, middle in enumerate((1.0, 2.0, 4.0, 4.0), 1):
        pauses = [policy.pause(number) for _ in range(100)]
        assert 0.5 * middle <= min(pauses) < middle < max(pauses) <= 1.5 * middle


def test_a_blocking_request_works_inside_and_outside_of_an_event_loop() -> None:
    async def inside(url: str) -> int:
        return fetch(f"{url}/v1/models", "k" * 20)[0]

    with FakeVLLM(key="k" * 20) as fake:
        assert fetch(f"{fake.url}/health") == (200, b"")
        assert fetch(f"{fake.url}/v1/models")[0] == 401
        assert asyncio.run(inside(fake.url)) == 200
        url = fake.url
    with pytest.raises(OSError, match="Cannot connect"):
        fetch(f"{url}/health")


def test_an_address_that_is_none_is_no_passing_failure() -> None:
    async def work() -> None:
        async with open_session() as session:
            await send(session, "GET", "http://", lambda response: response, seconds=1.0)

    with pytest.raises(aiohttp.InvalidURL):
        asyncio.run(work())
