"""Anthropic's Messages API at the gateway: what programs ask and are told."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from marlora.agents.types import Message
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.gateway.api.fields import BadRequest
from marlora.rollouts.gateway.api.messages import read_request
from tests.rollouts.asking import Asker, played
from tests.rollouts.gateway.test_server import CALL

TOOL = {"name": "calc", "description": "adds", "input_schema": {"type": "object"}}
ASK: dict[str, Any] = {
    "model": "a",
    "max_tokens": 128,
    "messages": [{"role": "user", "content": "7+8?"}],
}


def answer(prompt: str, *_: Any) -> str:
    if "tool_response" in prompt:
        return "It is 15."
    return CALL if "# Tools" in prompt else "15 END and more"


def test_the_anthropic_client_gets_what_it_expects() -> None:
    """The real client: a text, a stop string, a length, a stream, tools and their results, models'
    errors of its own types."""

    async def body(asker: Asker) -> str:
        address = asker.visit.base_url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=address, api_key=asker.visit.key) as client:
            said = await client.messages.create(**ASK, system="Be brief.")
            assert said.content[0].text == "15 END and more" and said.stop_reason == "end_turn"
            assert said.usage.output_tokens == len("15 END and more") + 1
            stopped = await client.messages.create(**ASK, stop_sequences=["zzz", " END"])
            assert stopped.content[0].text == "15"
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " END")
            short = await client.messages.create(**{**ASK, "max_tokens": 2})
            assert short.content[0].text == "15" and short.stop_reason == "max_tokens"
            async with client.messages.stream(**ASK) as stream:
                assert "".join([text async for text in stream.text_stream]) == "15 END and more"
                assert (await stream.get_final_message()).stop_reason == "end_turn"
            called = await client.messages.create(**ASK, tools=[TOOL])
            text, use = called.content
            assert called.stop_reason == "tool_use" and text.text == "Let me see."
            assert (use.name, use.input) == ("calc", {"x": 1})
            async with client.messages.stream(**ASK, tools=[TOOL]) as stream:
                assert (await stream.get_final_message()).content[1].input == {"x": 1}
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "15"}
            chat = [
                *ASK["messages"],
                {"role": "assistant", "content": [block.model_dump() for block in called.content]},
                {"role": "user", "content": [result]},
            ]
            last = await client.messages.create(**{**ASK, "messages": chat}, tools=[TOOL])
            with pytest.raises(anthropic.NotFoundError, match="no such agent"):
                await client.messages.create(**{**ASK, "model": "zzz"})
            with pytest.raises(anthropic.BadRequestError, match="cannot be read in a message"):
                image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
                await client.messages.create(**{**ASK, "messages": image})
        async with anthropic.AsyncAnthropic(base_url=address, api_key="other") as stranger:
            with pytest.raises(anthropic.AuthenticationError):
                await stranger.messages.create(**ASK)
        return str(last.content[0].text)

    episode = played(body, ScriptedEngine(answer))
    first, *_, called, streamed, last = episode.turns
    assert episode.output == "It is 15."
    assert first.messages == (Message("system", "Be brief."), Message("user", "7+8?"))
    start = called.prompt_ids + called.token_ids
    assert last.prompt_ids[: len(start)] == start, "the chat goes on with its tokens"
    assert last.messages[-1] == Message("tool", "15", tool_call_id=last.messages[-1].tool_call_id)
    assert streamed.prompt_ids == called.prompt_ids


def test_both_keys_at_once_are_no_key() -> None:
    async def body(asker: Asker) -> None:
        status, error = await asker.post("/messages", ASK, {"x-api-key": asker.visit.key})
        assert status == 401 and error["type"] == "error"
        assert error["error"]["type"] == "authentication_error"

    assert played(body).turns == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "calc"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"top_k": 0.5}, "top_k"),
        ({"max_token": 3}, "max_token"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_field(
    changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        read_request({**ASK, **changes})
    assert caught.value.param == field and caught.value.status == 400


def test_blocks_become_messages() -> None:
    """A result of a tool stands before the text beside it; a system prompt may be blocks."""
    use = {"type": "tool_use", "id": "u1", "name": "calc", "input": {"x": [1, "é"]}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, use]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and?"},
                {
                    "type": "tool_result",
                    "tool_use_id": "u1",
                    "content": [{"type": "text", "text": "5"}],
                },
            ],
        },
    ]
    system = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    request = read_request(
        {**ASK, "messages": chat, "system": system, "tool_choice": {"type": "any"}}
    )
    call = {
        "id": "u1",
        "name": "calc",
        "arguments": json.dumps({"x": [1, "é"]}, ensure_ascii=False),
    }
    assert request.messages == (
        Message("system", "Be brief."),
        Message("user", "ab"),
        Message("assistant", "so", tool_calls=(call,)),
        Message("tool", "5", tool_call_id="u1"),
        Message("user", "and?"),
    )
    assert request.forced
