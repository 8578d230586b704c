"""The gateway: what becomes of calls that are sent again, and who may ask at all."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import openai
import pytest

from marlora.agents.testing import fake_team
from marlora.agents.types import SettingError
from marlora.rollouts.gateway.retries import request_hash
from marlora.rollouts.gateway.server import GatewayServer
from tests.rollouts.asking import Asker, chat, numbered, play, played

# retries


def again(asker: Asker, count: int) -> Any:
    return asker.ask("a", "same", headers={"x-stainless-retry-count": str(count)})


def test_a_call_sent_again_is_the_same_turn() -> None:
    async def body(asker: Asker) -> None:
        keyed = {"Idempotency-Key": "k1"}
        one, two = (
            await asker.ask("a", "same", headers=keyed),
            await asker.ask("a", "same", headers=keyed),
        )
        assert one == two
        status, error = await asker.post("/chat/completions", chat("a", "other"), keyed)
        assert status == 422 and "was used for another request" in error["error"]["message"]
        three = await asker.ask("a", "same", headers={"Idempotency-Key": "k2"})
        four, five, six = await again(asker, 0), await again(asker, 1), await again(asker, 0)
        assert three["id"] != one["id"] and four["id"] not in (one["id"], three["id"])
        assert five == four and six["id"] != four["id"]
        assert (await asker.ask("a", "same"))["id"] != six["id"]  # nothing says that it is a retry

    assert [t.index for t in played(body, numbered()).turns] == [0, 1, 2, 3, 4]


def test_a_call_that_was_answered_holds_no_request_and_is_told_again() -> None:
    """Byte for byte the same body: one that is written otherwise is another request."""

    async def body(asker: Asker) -> None:
        one = await again(asker, 0)
        (call,) = asker.visit.calls
        assert call.delivered and call.connections == []
        assert await again(asker, 1) == one and len(asker.visit.calls) == 1
        assert request_hash("/a", b"{}") != request_hash("/a", b"{ }")
        assert request_hash("/a", b"{}") != request_hash("/b", b"{}")

    assert len(played(body, numbered()).turns) == 1


def test_equal_calls_at_the_same_time_are_one_unless_they_say_they_are_new() -> None:
    async def body(asker: Asker) -> None:
        one, two = await asyncio.gather(asker.ask("a", "same"), asker.ask("a", "same"))
        assert one == two
        three, four = await asyncio.gather(again(asker, 0), again(asker, 0))
        assert three["id"] != four["id"]

    engine = numbered()
    engine.latency = 0.2
    assert len(played(body, engine).turns) == 3


def test_a_reply_that_found_nobody_is_kept_for_the_next_try() -> None:
    async def body(asker: Asker) -> None:
        for when in (
            0.0,
            0.4,
        ):  # the next try comes while the engine still works, and after it is done
            text = f"wait {when}"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asker.ask("a", text), 0.1)
            await asyncio.sleep(when)
            assert (
                await asker.say("a", text, headers={"x-stainless-retry-count": "0"})
                == f"{1 if not when else 2}.0"
            )

    engine = numbered()
    engine.latency = 0.3
    assert [t.taken for t in played(body, engine).turns] == [True, True]


def test_a_turn_that_nobody_read_is_not_taken() -> None:
    async def body(asker: Asker) -> str:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asker.ask("a", "never mind"), 0.05)
        await asyncio.sleep(0.2)
        return await asker.say("b", "hi")

    engine = numbered()
    engine.latency = 0.1
    assert [(t.agent, t.taken) for t in played(body, engine).turns] == [("a", False), ("b", True)]


def test_a_failed_call_is_asked_again_not_repeated() -> None:
    async def body(asker: Asker) -> None:
        for _ in range(2):
            status, _ = await asker.post(
                "/chat/completions", chat("a", "x" * 5000), {"Idempotency-Key": "k"}
            )
            assert status == 400

    played(body)


def test_the_openai_client_tries_again_without_a_second_turn() -> None:
    """Its own retry after a time-out carries its count, so the turn that was asked for is the turn
    it gets."""

    async def body(asker: Asker) -> str:
        async with openai.AsyncOpenAI(
            base_url=asker.visit.base_url, api_key=asker.visit.key, max_retries=8, timeout=0.3
        ) as client:
            reply = await client.chat.completions.create(
                model="a", messages=[{"role": "user", "content": "x"}]
            )
            return str(reply.choices[0].message.content)

    engine = numbered()
    engine.latency = 0.8
    episode = played(body, engine)
    assert (
        episode.output == "1.0"
        and [(t.index, t.taken) for t in episode.turns] == [(0, True)]
        and len(engine.calls) == 1
    )


# who may ask


def test_only_the_key_of_an_episode_opens_it() -> None:
    async def body(asker: Asker) -> None:
        other = GatewayServer()
        words = "no such episode, it is over, or this is not its key"
        refused = {
            "message": words,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        for key in ("", "wrong", f"{asker.visit.key}x"):
            assert await asker.post("/chat/completions", chat("a", "x"), key=key) == (
                401,
                {"error": refused},
            )
        assert len(asker.visit.key) >= 32
        async with other.open_session(asker.visit.team) as second:
            assert second.key != asker.visit.key and second.id != asker.visit.id
            there = second.base_url.rsplit("/", 3)[0]
            nowhere = f"{there}/episodes/{asker.visit.id}/v1/chat/completions"
            assert await asker.post(nowhere, chat("a", "x")) == (401, {"error": refused})
            assert (await asker.post(f"{second.base_url}/chat/completions", chat("a", "x"))) == (
                401,
                {"error": refused},
            )

    assert played(body).turns == ()


def test_two_episodes_of_one_door_stay_apart_and_end_apart() -> None:
    async def main() -> None:
        gateway = GatewayServer()
        one, two = (fake_team(["a"], lambda agent, messages, n=n: f"team {n}") for n in (1, 2))
        async with aiohttp.ClientSession() as session:
            async with gateway.open_session(one) as first:
                async with gateway.open_session(two) as second:
                    assert (
                        first.base_url.split("/episodes")[0]
                        == second.base_url.split("/episodes")[0]
                    )  # one server
                    asker = Asker(second, session)
                    assert (
                        await asker.say("a", "x") == "team 2"
                        and await Asker(first, session).say("a", "x") == "team 1"
                    )
                    status, _ = await asker.post("/chat/completions", chat("a", "x"), key=first.key)
                    assert status == 401
                status, error = await asker.post("/chat/completions", chat("a", "x"))
                assert status == 401 and "it is over" in error["error"]["message"]
                await Asker(first, session).say("a", "y")
            with pytest.raises(aiohttp.ClientError):  # nobody is inside: nobody listens
                await Asker(first, session).say("a", "z")
        assert len(one.turns) == 2 and len(two.turns) == 1

    asyncio.run(main())


def test_browsers_other_names_and_other_routes_are_refused() -> None:
    async def body(asker: Asker) -> None:
        url = asker.visit.base_url.split("/episodes")[0]
        assert url.startswith("http://127.0.0.1:")  # loopback unless told otherwise
        for headers, told in (
            ({"Host": "evil.example"}, "Host"),
            ({"Origin": "http://127.0.0.1"}, "Origin"),
        ):
            status, error = await asker.post("/chat/completions", chat("a", "x"), headers)
            assert status == 403 and error["error"]["message"].startswith(told)
        for path in (
            "/",
            "/metrics",
            f"/episodes/{asker.visit.id}",
            f"/episodes/{asker.visit.id}/v1/embeddings",
        ):
            status, error = await asker.post(url + path, {})
            assert status == 404 and "error" in error
        assert (await asker.get("/chat/completions"))[0] == 405

    assert played(body).turns == ()


def test_bodies_have_a_size_and_a_time() -> None:
    async def main() -> None:
        gateway = GatewayServer(max_body=1000, body_timeout=0.2)
        async with (
            gateway.open_session(fake_team(["a"], lambda *_: "15")) as visit,
            aiohttp.ClientSession() as session,
        ):
            asker = Asker(visit, session)
            status, error = await asker.post("/chat/completions", chat("a", "x" * 2000))
            assert status == 413 and error["error"]["type"] == "invalid_request_error"
            host, port = visit.base_url.split("/")[2].split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = (
                f"POST /episodes/{visit.id}/v1/chat/completions HTTP/1.1\r\nHost:"
                f" {host}:{port}\r\nAuthorization: Bearer {visit.key}\r\n"
            )
            writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in await reader.readline()
            writer.close()
            assert await asker.say("a", "x") == "15"

    asyncio.run(main())


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(
        SettingError,
        match=r"host '0\.0\.0\.0': name the address that programs reach this machine by",
    ):
        GatewayServer("0.0.0.0")
    with pytest.raises(SettingError, match="cannot listen there"):
        play(lambda asker: asker.say("a", "x"), program={"host": "192.0.2.1"})
