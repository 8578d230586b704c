"""Outside models behind an OpenAI-compatible address, on a small server of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from pathlib import Path
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
    Usage,
)
from marlora.rollouts.engines.base import EngineError, PromptTooLong
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import (
    AnswerLost,
    APICompleter,
    EngineCompleter,
    completers,
    read_usage,
)

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
    ],
    "usage": {
        "prompt_tokens": 12,
        "completion_tokens": 9,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 5},
    },
}
REPORTED = Usage(1, 12, 9, cached_tokens=5)


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
    *answers: tuple[int, Any] | str, base: str | None = "big", key_env: str = ""
) -> tuple[list[Completion] | Exception, Outside]:
    """What the speaker gives or raises, and the server."""

    async def go() -> tuple[list[Completion] | Exception, Outside]:
        async with serve(*answers) as outside:
            speaker = APICompleter(
                PolicySpec("helper", base=base, url=outside.url + "/", key_env=key_env), pause=0.001
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
        Completion("hello", policy="helper", usage=REPORTED),
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
    result, outside = ask((429, "slow down"), (503, "busy"), (502, ""), (200, GOOD))
    assert isinstance(result, list) and result[0].text == "hello" and len(outside.bodies) == 4
    assert outside.bodies[0] == outside.bodies[3]  # the seed too


def test_a_lost_answer_is_another_matter() -> None:
    """Its server may have served and charged it, so it is for the caller to make another call."""
    result, outside = ask((503, "busy"), "drop", (200, GOOD))
    assert isinstance(result, AnswerLost) and len(outside.bodies) == 2
    assert 0 < result.pause < 0.01 and "ServerDisconnected" in str(result)


def test_an_answer_that_takes_too_long_is_lost() -> None:
    async def go() -> None:
        async def sleep(request: web.Request) -> web.Response:
            await asyncio.sleep(5)
            return web.json_response(GOOD)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", sleep)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            with pytest.raises(AnswerLost, match="did not answer: TimeoutError"):
                await APICompleter(PolicySpec("helper", url=url), timeout=0.05)(CALL, "")
        finally:
            await runner.cleanup()

    asyncio.run(go())


def test_trouble_that_stays_ends_with_the_servers_words() -> None:
    result, outside = ask(*[(500, "out of luck")] * 5)
    assert isinstance(result, EngineError) and len(outside.bodies) == 4
    assert str(result).startswith(
        "policy 'helper': outside model at http://127.0.0.1:"
    ) and "500 out of luck" in str(result)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_one_line_that_names_policy_variable_and_address(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MARLORA_OUTSIDE_KEY", "OUR_KEY"):
        monkeypatch.setenv(name, f"sesame-of-{name.lower()}")
    for key_env, name in (("", "MARLORA_OUTSIDE_KEY"), ("OUR_KEY", "OUR_KEY")):
        result, outside = ask((status, "no\nsuch key"), (200, GOOD), key_env=key_env)
        assert type(result) is EngineError and len(outside.bodies) == 1
        assert outside.keys == [f"Bearer sesame-of-{name.lower()}"]
        assert str(result) == (
            f"policy 'helper': {outside.url}/chat/completions refuses the key in {name}: {status}"
            " no such key; put a key there that this server takes, or name another environment"
            " variable with key_env"
        )
    monkeypatch.delenv("MARLORA_OUTSIDE_KEY")
    result, _ = ask((status, "who?"))
    assert (
        f"refuses a request without a key (MARLORA_OUTSIDE_KEY is not set): {status} who?"
        in str(result)
    )


def test_a_key_may_be_in_a_file_and_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sesame-of-a-file\n")
    path.chmod(0o600)
    _, outside = ask((200, GOOD), key_env=str(path))
    assert outside.keys == ["Bearer sesame-of-a-file"]
    path.unlink()
    with pytest.raises(SettingError, match=r"^policy 'helper': key_env: expected the name of"):
        APICompleter(PolicySpec("helper", url="http://127.0.0.1:9/v1", key_env=str(path)))


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


# usage

MOST = Usage(1, 100, 14)


@pytest.mark.parametrize(
    ("report", "usage", "faults"),
    [
        ({"prompt_tokens": 12, "completion_tokens": 9}, Usage(1, 12, 9), []),
        (
            {"prompt_tokens": 12, "completion_tokens": 9, "prompt_tokens_details": None},
            Usage(1, 12, 9),
            [],
        ),
        (GOOD["usage"], REPORTED, []),
        (None, MOST, ["no prompt_tokens", "no completion_tokens"]),
        ("12", MOST, ["no prompt_tokens", "no completion_tokens"]),
        ({"prompt_tokens": 12}, Usage(1, 12, 14), ["no completion_tokens"]),
        (
            {"prompt_tokens": -1, "completion_tokens": 9.5},
            MOST,
            ["prompt_tokens -1", "completion_tokens 9.5"],
        ),
        (
            {"prompt_tokens": True, "completion_tokens": "9"},
            MOST,
            ["prompt_tokens True", "completion_tokens '9'"],
        ),
        # no chat has a prompt of no token, and two replies are two tokens at least
        (
            {"prompt_tokens": 0, "completion_tokens": 1},
            MOST,
            ["prompt_tokens 0", "completion_tokens 1"],
        ),
        # more than was asked for is believed
        ({"prompt_tokens": 101, "completion_tokens": 15}, Usage(1, 101, 15), []),
        (
            {**GOOD["usage"], "prompt_tokens_details": {"cached_tokens": 13}},
            Usage(1, 12, 9),
            ["cached_tokens 13 of a prompt of 12"],
        ),
        (
            {**GOOD["usage"], "prompt_tokens_details": {"cached_tokens": "5"}},
            Usage(1, 12, 9),
            ["cached_tokens '5'"],
        ),
    ],
)
def test_usage_is_what_the_server_reports_and_else_the_most(
    report: Any, usage: Usage, faults: list[str]
) -> None:
    assert read_usage(report, MOST, least=2) == (usage, faults)


def test_a_server_without_a_report_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    silent = {"choices": GOOD["choices"]}

    async def go() -> tuple[list[list[Completion]], int, str]:
        async with serve((200, silent), (200, silent)) as outside:
            speaker = APICompleter(PolicySpec("helper", url=outside.url))
            found = [await speaker(CALL, "") for _ in range(2)]
            return found, speaker.most_prompt_tokens(CALL), speaker.url

    with caplog.at_level(logging.WARNING):
        found, bound, url = asyncio.run(go())
    for first, second in found:
        assert first.usage == Usage(1, bound, 14) and second.usage is None
    assert [record.getMessage() for record in caplog.records] == [
        f"policy 'helper': {url} sends a report of its usage with no prompt_tokens, no"
        " completion_tokens; the most that it can be is counted instead"
    ]


def test_no_tokenizer_has_more_tokens_than_the_bound() -> None:
    """A token per byte, with a template of 200 tokens and 20 a message, in each form of Unicode:
    U+FDFA is 3 bytes, and 33 in the compatible form; U+1D160 is 4, and 12 in the canonical one."""
    speaker = APICompleter(PolicySpec("helper", url="http://127.0.0.1:9/v1"))
    for text, tokens in (
        ("hi", 2),
        ('"\\\n\t' * 50, 200),
        ("\ufdfa" * 50, 33 * 50),
        ("\U0001d160" * 50, 12 * 50),
        ("\ud800", 3),
    ):
        call = dataclasses.replace(CALL, messages=(Message("user", text),) * 3)
        assert 200 + 3 * (20 + tokens) <= speaker.most_prompt_tokens(call)
    tools = Message(
        "assistant", "", tool_calls=({"function": {"name": "f", "arguments": "x" * 500}},)
    )
    longer = dataclasses.replace(CALL, messages=(*CALL.messages, tools))
    assert speaker.most_prompt_tokens(longer) >= speaker.most_prompt_tokens(CALL) + 500


def test_a_template_that_is_longer_than_expected_is_allowed_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        async with serve(*[(200, {**GOOD, "usage": long})] * 2) as outside:
            speaker.policy = dataclasses.replace(speaker.policy, url=outside.url)
            for _ in range(2):
                (first, _) = await speaker(CALL, "")
                assert first.usage == Usage(1, before + 70, 9)
                assert speaker.most_prompt_tokens(CALL) == before + 70

    speaker = APICompleter(PolicySpec("helper", url="http://127.0.0.1:9/v1"))
    before = speaker.most_prompt_tokens(CALL)
    long = {"prompt_tokens": before + 70, "completion_tokens": 9}
    asyncio.run(go())
    (record,) = caplog.records
    assert f"reports {before + 70} tokens of a prompt that has {before} at most" in record.message
