"""Anthropic's Messages API: request and reply bodies of `/messages`, as far as they are a chat:
texts, tools and their results in, texts and tool uses out.

Not supported: images and documents, tools that the server runs, extended thinking, batches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ....agents.types import Message, Turn
from .chat import Request, read_sampling, read_stop, shown, usage
from .fields import (
    BadRequest,
    brief,
    check_body,
    flag,
    items,
    loaded,
    mapping,
    one_of,
    optional_mapping,
    optional_text,
    text,
    whole,
    wrong,
)
from .tools import read_function

# `cache_control` changes nothing: a chat's prefix is cached anyway
WITHOUT_EFFECT = ("metadata", "service_tier", "cache_control")
KNOWN = (
    "model",
    "messages",
    "system",
    "max_tokens",
    "stop_sequences",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "tools",
    "tool_choice",
    "thinking",
    *WITHOUT_EFFECT,
)
CHOICES = ("auto", "any", "tool", "none")


def read_request(body: Any) -> Request:
    """The request of a body of `/messages`."""
    check_body(body, KNOWN)
    _check_unused(body)
    given = items(body.get("messages"), "messages")
    if not given:
        raise wrong("messages", "expected at least one")
    system = _texts(body["system"], "system") if body.get("system") is not None else None
    chat = [m for i, each in enumerate(given) for m in _read_message(each, f"messages[{i}]")]
    tools, choice = _read_tools(body.get("tools")), _read_choice(body.get("tool_choice"))
    most = whole(body.get("max_tokens"), "max_tokens", 1, 2**31)
    if most is None:
        raise wrong("max_tokens", "expected a whole number; this API requires it")
    return Request(
        model=text(body.get("model"), "model"),
        messages=tuple(chat if system is None else [Message("system", system), *chat]),
        max_tokens=most,
        stop=read_stop(body.get("stop_sequences"), "stop_sequences"),
        tools=() if choice == "none" else tools,
        forced=choice in ("any", "tool"),
        sampling=read_sampling(body),
        stream=flag(body.get("stream"), "stream"),
    )


def _check_unused(body: Mapping[str, Any]) -> None:
    thinking = optional_mapping(body.get("thinking"), "thinking")
    if thinking.get("type", "disabled") != "disabled":
        raise wrong("thinking.type", "agents here think in their text, if at all; leave it out")
    optional_mapping(body.get("metadata"), "metadata")
    optional_mapping(body.get("cache_control"), "cache_control")
    optional_text(body.get("service_tier"), "service_tier")


def _read_message(data: Any, where: str) -> list[Message]:
    """The messages of one: results of tools are messages of their own, before the text beside
    them."""
    role = one_of(mapping(data, where).get("role"), f"{where}.role", ("user", "assistant"))
    content = data.get("content")
    if isinstance(content, str):
        return [Message(role, content)]  # type: ignore[arg-type]
    if not isinstance(content, list) or not content:
        raise wrong(
            f"{where}.content", f"expected a text or a list of blocks, got {brief(content)}"
        )
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for i, part in enumerate(items(content, f"{where}.content")):
        spot = f"{where}.content[{i}]"
        kind = mapping(part, spot).get("type")
        if kind == "text":
            texts.append(text(part.get("text"), f"{spot}.text"))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_read_use(part, spot))
        elif kind == "tool_result" and role == "user":
            results.append(_read_result(part, spot))
        else:
            problem = f"a block of type {brief(kind)} cannot be read in a message of the {role}"
            raise wrong(f"{spot}.type", problem)
    if role == "assistant":
        return [Message("assistant", "".join(texts), tool_calls=tuple(calls))]
    return [*results, *([Message("user", "".join(texts))] if texts or not results else [])]


def _read_use(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = optional_mapping(part.get("input"), f"{where}.input")
    return {
        "id": optional_text(part.get("id"), f"{where}.id") or "",
        "name": text(part.get("name"), f"{where}.name"),
        "arguments": json.dumps(given, ensure_ascii=False),
    }


def _read_result(part: Mapping[str, Any], where: str) -> Message:
    flag(part.get("is_error"), f"{where}.is_error")
    content = part.get("content")
    told = "" if content is None else _texts(content, f"{where}.content")
    return Message(
        "tool", told, tool_call_id=optional_text(part.get("tool_use_id"), f"{where}.tool_use_id")
    )


def _texts(content: Any, where: str) -> str:
    """A text, or blocks of text joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(where, f"expected a text or a list of blocks, got {brief(content)}")
    texts = []
    for i, part in enumerate(items(content, where)):
        one_of(mapping(part, f"{where}[{i}]").get("type"), f"{where}[{i}].type", ("text",))
        texts.append(text(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts)


def _read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    tools = []
    for i, each in enumerate(items(value, "tools")):
        where = f"tools[{i}]"
        if mapping(each, where).get("type", "custom") != "custom":
            raise wrong(f"{where}.type", "only tools of the program's own can be called here")
        schema = mapping(each.get("input_schema"), f"{where}.input_schema")
        tools.append(read_function({**each, "parameters": schema}, where))
    return tuple(tools)


def _read_choice(value: Any) -> str:
    if value is None:
        return "auto"
    choice = one_of(mapping(value, "tool_choice").get("type"), "tool_choice.type", CHOICES)
    if choice == "tool":
        text(value.get("name"), "tool_choice.name")
    return choice


# answers


def reply_body(name: str, request: Request, turns: Sequence[Turn]) -> dict[str, Any]:
    """The body of a reply."""
    (turn, *_), count = turns, usage(turns)
    message = shown(turn, request)
    content: list[dict[str, Any]] = []
    if message.content or not message.tool_calls:
        content.append({"type": "text", "text": message.content, "citations": None})
    content += [
        {
            "type": "tool_use",
            "id": call["id"],
            "name": call["name"],
            "input": _input(call["arguments"]),
        }
        for call in message.tool_calls
    ]
    reason, stop = _stop_reason(turn, request, bool(message.tool_calls))
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": {
            "input_tokens": count["prompt_tokens"],
            "output_tokens": count["completion_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        },
    }


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as the object that this API wants; others than objects stand in one, under
    `arguments`."""
    given = loaded(arguments)
    return given if isinstance(given, dict) else {"arguments": given}


def _stop_reason(turn: Turn, request: Request, called: bool) -> tuple[str, str | None]:
    if called:
        return "tool_use", None
    if turn.finish_reason == "length":
        return "max_tokens", None
    found = [(at, stop) for stop in request.stop if (at := turn.text.find(stop)) >= 0]
    return ("stop_sequence", min(found)[1]) if found else ("end_turn", None)


def reply_events(reply: Mapping[str, Any]) -> list[str]:
    """The reply as server-sent events; the engine returns whole answers, so each block is one
    delta."""
    empty = {**reply, "content": [], "stop_reason": None, "stop_sequence": None}
    empty["usage"] = {**reply["usage"], "output_tokens": 0}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": empty}]
    for index, part in enumerate(reply["content"]):
        if part["type"] == "text":
            bare, delta = {**part, "text": ""}, {"type": "text_delta", "text": part["text"]}
        else:
            bare = {**part, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(part["input"])}
        events += [
            {"type": "content_block_start", "index": index, "content_block": bare},
            {"type": "content_block_delta", "index": index, "delta": delta},
            {"type": "content_block_stop", "index": index},
        ]
    ended = {key: reply[key] for key in ("stop_reason", "stop_sequence")}
    events += [
        {
            "type": "message_delta",
            "delta": ended,
            "usage": {"output_tokens": reply["usage"]["output_tokens"]},
        },
        {"type": "message_stop"},
    ]
    return [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events]


def error_body(error: BadRequest) -> dict[str, Any]:
    """The error reply, in Anthropic's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": kinds.get(error.status, usual), "message": str(error)},
    }
