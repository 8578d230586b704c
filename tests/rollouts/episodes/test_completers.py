"""Outside models behind an OpenAI-compatible address, on a small server of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from marlora.agents.transcript import Call
from marlora.agents.types import (
    BASE,
    AgentSpec,
    Completion,
    Message,
    PolicySpec,
    Sampling,
    SettingError,
    Turn,
)
from marlora.rollouts.engines.base import EngineError, PromptTooLong
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import APICompleter, EngineCompleter, completers

CALL = Call(
    0,
    AgentSpec("helper"),
    (Message("system", "be kind"), Message("user", "hi")),
    Sampling(max_tokens=7, seed=5),
    2,
)
GOOD = {
    "choices": [
        {"message": {"content": "hello"}, "finish_reason": "stop"},
        {"message": {"content": None}, "finish_reason": "length"},
    ]
}


class Outside:
    """Answers in turn with (status, body); `drop` closes the connection. Keeps what it was sent."""

    def __init__(self, *answers: tuple[int, Any] | str) -> None:
        self.answers, self.bodies, self.keys = list(answers), [], []  # type: ignore[var-annotated]
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        kind = self.answers.pop(0)
        if isinstance(kind, str):
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        status, body = kind
        return (
            web.Response(status=status, text=body)
            if isinstance(body, str)
            else web.json_response(body, status=status)
        )


@contextlib.asynccontextmanager
async def serve(*answers: tuple[int, Any] | str) -> AsyncIterator[Outside]:
    outside = Outside(*answers)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", outside.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    outside.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield outside
    finally:
        await runner.cleanup()


def ask(
    *answers: tuple[int, Any] | str, base: str | None = "big"
) -> tuple[list[Completion] | Exception, Outside]:
    """What the speaker gives or raises, and the server."""

    async def go() -> tuple[list[Completion] | Exception, Outside]:
        async with serve(*answers) as outside:
            speaker = APICompleter(
                PolicySpec("helper", base=base, url=outside.url + "/"), pause=0.001
            )
            try:
                return await speaker(CALL, ""), outside
            except Exception as error:
                return error, outside

    return asyncio.run(go())


def test_an_outside_model_answers_with_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MARLORA_OUTSIDE_KEY", raising=False)
    result, outside = ask((200, GOOD))
    assert result == [
        Completion("hello", policy="helper"),
        Completion("", finish_reason="length", policy="helper"),
    ]
    assert outside.bodies == [
        {
            "model": "big",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"},
            ],
            "n": 2,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 7,
            "seed": 5,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
    ]
    assert outside.keys == [None]
    monkeypatch.setenv("MARLORA_OUTSIDE_KEY", "secret")
    _, outside = ask((200, GOOD), base=None)
    assert outside.keys == ["Bearer secret"] and outside.bodies[0]["model"] == "helper"


def test_passing_trouble_is_tried_again() -> None:
    result, outside = ask((429, "slow down"), (503, "busy"), "drop", (200, GOOD))
    assert isinstance(result, list) and result[0].text == "hello" and len(outside.bodies) == 4
    assert outside.bodies[0] == outside.bodies[3]  # the seed too


def test_trouble_that_stays_ends_with_the_servers_words() -> None:
    result, outside = ask(*[(500, "out of luck")] * 5)
    assert isinstance(result, EngineError) and len(outside.bodies) == 4
    assert str(result).startswith(
        "policy 'helper': outside model at http://127.0.0.1:"
    ) and "500 out of luck" in str(result)


def test_a_refusal_is_not_tried_again() -> None:
    result, outside = ask((401, "no such key"), (200, GOOD))
    assert (
        isinstance(result, EngineError)
        and "401 no such key" in str(result)
        and len(outside.bodies) == 1
    )


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "context_length_exceeded"}},
        "This model's maximum context length is 64 tokens",
        "prompt is too long",
    ],
)
def test_a_prompt_that_does_not_fit_is_an_error_of_its_own(body: Any) -> None:
    result, outside = ask((400, body))
    assert isinstance(result, PromptTooLong) and len(outside.bodies) == 1
    assert type(ask((400, "no such model"))[0]) is EngineError


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        "",
        "[]",
        "null",
        {"choices": None},
        {"choices": [{}]},
        {"choices": ["text"]},
        {"object": "list"},
    ],
)
def test_what_is_no_completion_is_an_error(body: Any) -> None:
    result, _ = ask((200, body))
    assert type(result) is EngineError and "sent no chat completion" in str(result), result


def test_addresses_that_are_none() -> None:
    with pytest.raises(SettingError, match="policy 'helper': url is empty"):
        APICompleter(PolicySpec("helper", url=""))
    with pytest.raises(SettingError, match=r"policies\.helper\.url: expected http://HOST:PORT/v1"):
        APICompleter(PolicySpec("helper", url="far away"))


def test_nobody_at_the_address() -> None:
    speaker = APICompleter(PolicySpec("helper", url="http://127.0.0.1:9/v1"), tries=2, pause=0.001)
    with pytest.raises(EngineError, match="did not answer: Client"):
        asyncio.run(speaker(CALL, ""))


def test_a_chat_with_an_outside_turn_in_it_is_encoded_anew() -> None:
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "ok")
    speaker = EngineCompleter(engine, engine.tokens, "helper")
    messages = (*CALL.messages, Message("assistant", "outside words"), Message("user", "go on"))
    previous = Turn(0, "helper", CALL.messages, text="outside words")  # no tokens
    (result,) = asyncio.run(
        speaker(Call(1, AgentSpec("helper"), messages, Sampling(), 1, previous), "")
    )
    assert result.prompt_ids == engine.tokens.prompt(messages)


def test_every_policy_gets_its_speaker() -> None:
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "ok")
    policies = {
        "solver": PolicySpec("solver"),
        "far": PolicySpec("far", url="http://127.0.0.1:9/v1"),
    }
    result = completers(
        policies, {"solver": (engine, engine.tokens), BASE: (engine, engine.tokens)}
    )
    assert isinstance(result["solver"], EngineCompleter) and isinstance(result["far"], APICompleter)
    assert isinstance(result[BASE], EngineCompleter) and result[BASE].policy == BASE
