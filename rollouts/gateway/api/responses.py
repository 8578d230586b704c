"""Responses API request and reply bodies, as far as they are a chat: texts, functions and their
results in, texts and function calls out.

Not supported: built-in tools, images, background work, conversations longer than the episode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ....agents.types import Message, Turn
from .chat import (
    NUMBERS,
    WITHOUT_EFFECT,
    Request,
    check_unused,
    plain_text,
    read_message,
    read_sampling,
    shown,
    usage,
)
from .fields import (
    BadRequest,
    brief,
    check_body,
    flag,
    items,
    mapping,
    optional_mapping,
    optional_text,
    text,
    whole,
    wrong,
)
from .tools import read_choice, read_form, read_function

KNOWN = (
    "model",
    "input",
    "instructions",
    "tools",
    "tool_choice",
    "max_output_tokens",
    "text",
    "stream",
    "stream_options",
    "previous_response_id",
    "include",
    "truncation",
    "reasoning",
    *NUMBERS,
    *WITHOUT_EFFECT,
)


def read_response(body: Any, chat_of: Callable[[str], tuple[Message, ...]]) -> Request:
    """The request of a body of `/responses`. `chat_of`: from a `previous_response_id` to its
    chat."""
    check_body(body, KNOWN)
    check_unused(body)
    _check_ignored(body)
    before = optional_text(body.get("previous_response_id"), "previous_response_id")
    instructions = optional_text(body.get("instructions"), "instructions")
    form = optional_mapping(body.get("text"), "text").get("format")
    tools, choice = _read_tools(body.get("tools")), read_choice(body.get("tool_choice"))
    new = read_items(body.get("input"))
    earlier = chat_of(before) if before else ()
    if instructions is not None:  # for this response only; those of an earlier one end
        earlier = tuple(m for i, m in enumerate(earlier) if i or m.role != "system")
        earlier = (Message("system", instructions), *earlier)
    return Request(
        model=text(body.get("model"), "model"),
        messages=(*earlier, *new),
        max_tokens=whole(body.get("max_output_tokens"), "max_output_tokens", 1, 2**31),
        tools=() if choice == "none" else tools,
        forced=choice == "required",
        sampling=read_sampling(body),
        grammar=read_form(form, "text.format"),
        stream=flag(body.get("stream"), "stream"),
        messages_field="input",
    )


def _check_ignored(body: Mapping[str, Any]) -> None:
    optional_mapping(body.get("stream_options"), "stream_options")
    optional_text(optional_mapping(body.get("text"), "text").get("verbosity"), "text.verbosity")
    optional_text(body.get("truncation"), "truncation")
    for key, each in optional_mapping(body.get("reasoning"), "reasoning").items():
        optional_text(each, f"reasoning.{key[:80]}")
    for i, each in enumerate(items(body.get("include"), "include")):
        text(each, f"include[{i}]")


def _read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    tools = []
    for i, each in enumerate(items(value, "tools")):
        where = f"tools[{i}]"
        if mapping(each, where).get("type") != "function":
            problem = "expected an object of type function; others cannot be shown to a model here"
            raise BadRequest(400, f"{where}: {problem}", param=f"{where}.type")
        tools.append(read_function(each, where))
    return tuple(tools)


def read_items(given: Any) -> list[Message]:
    """Input items as messages; function calls in a row are one message of the assistant."""
    if isinstance(given, str):
        return [Message("user", given)]
    if not isinstance(given, list) or not given:
        raise wrong("input", f"expected a text or a list of items, got {brief(given)}")
    messages: list[Message] = []
    joins = False  # the item before was the assistant's, so a call belongs to its message
    for i, item in enumerate(items(given, "input")):
        where = f"input[{i}]"
        kind = mapping(item, where).get("type", "message")
        if kind == "message":
            messages.append(read_message(item, where))
        elif kind == "function_call":
            call = _read_call(item, where)
            continues = joins and messages[-1].role == "assistant"
            last = messages.pop() if continues else Message("assistant", "")
            messages.append(Message("assistant", last.content, tool_calls=(*last.tool_calls, call)))
        elif kind == "function_call_output":
            output = plain_text(item.get("output"), f"{where}.output")
            messages.append(
                Message(
                    "tool",
                    output,
                    tool_call_id=optional_text(item.get("call_id"), f"{where}.call_id"),
                )
            )
        elif kind != "reasoning":  # agents here have none
            raise wrong(f"{where}.type", f"an item of type {brief(kind)} cannot be read here")
        joins = kind in ("function_call", "message")
    return messages


def _read_call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        "id": optional_text(item.get("call_id"), f"{where}.call_id") or "",
        "name": text(item.get("name"), f"{where}.name"),
        "arguments": optional_text(item.get("arguments"), f"{where}.arguments") or "{}",
    }


def response(name: str, created: int, request: Request, turns: Sequence[Turn]) -> dict[str, Any]:
    """The body of a reply."""
    message, count = shown(turns[0], request), usage(turns)
    cut = turns[0].finish_reason == "length"
    output: list[dict[str, Any]] = []
    if message.content or not message.tool_calls:
        content = {
            "type": "output_text",
            "text": message.content,
            "annotations": [],
            "logprobs": [],
        }
        output.append(
            {
                "id": f"msg_{name}",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [content],
            }
        )
    for call in message.tool_calls:
        item = {
            "type": "function_call",
            "id": f"fc_{call['id']}",
            "call_id": call["id"],
            "name": call["name"],
        }
        output.append({**item, "arguments": call["arguments"], "status": "completed"})
    return {
        "id": name,
        "object": "response",
        "created_at": created,
        "model": request.model,
        "output": output,
        "status": "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [
            {"type": "function", "strict": False, **tool["function"]} for tool in request.tools
        ],
        "temperature": None,
        "top_p": None,
        "previous_response_id": None,
        "usage": {
            "input_tokens": count["prompt_tokens"],
            "output_tokens": count["completion_tokens"],
            "total_tokens": count["total_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }


def response_events(reply: Mapping[str, Any]) -> list[str]:
    """The reply as server-sent events; each item of the output is one delta."""
    empty = {
        **reply,
        "status": "in_progress",
        "output": [],
        "usage": None,
        "incomplete_details": None,
    }
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": empty},
        {"type": "response.in_progress", "response": empty},
    ]
    for at, item in enumerate(reply["output"]):
        place = {"item_id": item["id"], "output_index": at}
        bare: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        opened = {**item, **bare, "status": "in_progress"}
        events.append({"type": "response.output_item.added", "output_index": at, "item": opened})
        if item["type"] == "message":
            (part,) = item["content"]
            spot, text = {**place, "content_index": 0}, part["text"]
            events += [
                {"type": "response.content_part.added", **spot, "part": {**part, "text": ""}},
                {"type": "response.output_text.delta", **spot, "delta": text, "logprobs": []},
                {"type": "response.output_text.done", **spot, "text": text, "logprobs": []},
                {"type": "response.content_part.done", **spot, "part": part},
            ]
        else:
            arguments = item["arguments"]
            events += [
                {"type": "response.function_call_arguments.delta", **place, "delta": arguments},
                {
                    "type": "response.function_call_arguments.done",
                    **place,
                    "arguments": arguments,
                    "name": item["name"],
                },
            ]
        events.append({"type": "response.output_item.done", "output_index": at, "item": item})
    events.append({"type": f"response.{reply['status']}", "response": reply})
    return [
        f"event: {e['type']}\ndata: {json.dumps({**e, 'sequence_number': n})}\n\n"
        for n, e in enumerate(events)
    ]
