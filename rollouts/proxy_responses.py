"""The Responses API, as far as it is a chat: texts, functions and their results in, texts and calls of functions out.

Not here: built-in tools, images, background work, conversations kept for longer than the episode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..agents.types import Message, Turn, nearest
from .proxy_wire import (
    NUMBERS,
    WITHOUT_EFFECT,
    Refused,
    Request,
    number,
    plain_text,
    read_chat,
    read_message,
    shown,
    text_of,
    usage,
)  # fmt: skip

KNOWN = ("model", "input", "instructions", "tools", "tool_choice", "max_output_tokens", "text", "stream", "stream_options",
         "previous_response_id", "include", "truncation", "reasoning", *NUMBERS, *WITHOUT_EFFECT)  # fmt: skip


def read_response(body: Any, chat_of: Callable[[str], tuple[Message, ...]]) -> Request:
    """The request of a body of `/responses`. `chat_of`: the chat that a `previous_response_id` stands for."""
    if not isinstance(body, dict):
        raise Refused(400, "expected a JSON object")
    for key in body:
        if key not in KNOWN:
            raise Refused(400, f"{key}: not understood here; {nearest(str(key), KNOWN)}", "unknown_parameter")
    earlier = chat_of(str(body["previous_response_id"])) if body.get("previous_response_id") else ()
    instructions = body.get("instructions")
    if instructions is not None:  # they hold for this response only: those of an earlier one are not carried over
        earlier = tuple(m for i, m in enumerate(earlier) if i or m.role != "system")
        earlier = (Message("system", text_of(instructions, "instructions")), *earlier)
    form = (body.get("text") or {}).get("format") if isinstance(body.get("text") or {}, dict) else None
    chat = {
        "model": body.get("model"),
        "messages": [{"role": "user", "content": ""}],
        "max_tokens": body.get("max_output_tokens"),
        "tools": [_chat_tool(tool) for tool in body.get("tools") or []],
        "tool_choice": body.get("tool_choice"),
        "stream": body.get("stream"),
        "response_format": {"type": form.get("type"), "json_schema": form} if isinstance(form, dict) else None,
        **{key: number(body[key], key) for key in NUMBERS if body.get(key) is not None},
    }
    made = read_chat(chat)
    return Request(**{**made.__dict__, "messages": (*earlier, *read_items(body.get("input")))})


def _chat_tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: tool.get(key) for key in ("name", "description", "parameters")}}


def read_items(items: Any) -> list[Message]:
    """Input items as messages; calls of functions that follow one another are one message of the assistant's."""
    if isinstance(items, str):
        return [Message("user", items)]
    if not isinstance(items, list) or not items:
        raise Refused(400, "input: expected a text or a list of items")
    found: list[Message] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            found.append(read_message(item, where))
        elif kind == "function_call":
            call = {"id": str(item.get("call_id") or ""), "name": text_of(item.get("name"), f"{where}.name"),
                    "arguments": text_of(item.get("arguments") or "{}", f"{where}.arguments")}  # fmt: skip
            if found and found[-1].role == "assistant" and i and items[i - 1].get("type") in ("function_call", "message"):
                last = found.pop()
                found.append(Message("assistant", last.content, tool_calls=(*last.tool_calls, call)))
            else:
                found.append(Message("assistant", "", tool_calls=(call,)))
        elif kind == "function_call_output":
            found.append(Message("tool", plain_text(item.get("output"), f"{where}.output"), tool_call_id=str(item.get("call_id"))))
        elif kind != "reasoning":  # ours have none
            raise Refused(400, f"{where}: an item of type {kind!r:.40} cannot be read here")
    return found


def response(name: str, created: int, request: Request, turns: Sequence[Turn]) -> dict[str, Any]:
    """The reply to a call."""
    said, count = shown(turns[0], request), usage(turns)
    cut = turns[0].finish_reason == "length"
    output: list[dict[str, Any]] = []
    if said.content or not said.tool_calls:
        content = {"type": "output_text", "text": said.content, "annotations": [], "logprobs": []}
        output.append({"id": f"msg_{name}", "type": "message", "role": "assistant", "status": "completed", "content": [content]})
    for call in said.tool_calls:
        item = {"type": "function_call", "id": f"fc_{call['id']}", "call_id": call["id"], "name": call["name"]}
        output.append({**item, "arguments": call["arguments"], "status": "completed"})
    return {
        "id": name, "object": "response", "created_at": created, "model": request.model, "output": output,
        "status": "incomplete" if cut else "completed", "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": None, "metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in request.tools],
        "temperature": None, "top_p": None, "previous_response_id": None,
        "usage": {
            "input_tokens": count["prompt_tokens"], "output_tokens": count["completion_tokens"],
            "total_tokens": count["total_tokens"], "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    }  # fmt: skip


def response_events(reply: Mapping[str, Any]) -> list[str]:
    """The same as server-sent events; each item of the output comes in one piece."""
    empty = {**reply, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
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
            told = item["arguments"]
            events += [
                {"type": "response.function_call_arguments.delta", **place, "delta": told},
                {"type": "response.function_call_arguments.done", **place, "arguments": told, "name": item["name"]},
            ]
        events.append({"type": "response.output_item.done", "output_index": at, "item": item})
    events.append({"type": f"response.{reply['status']}", "response": reply})
    return [f"event: {e['type']}\ndata: {json.dumps({**e, 'sequence_number': n})}\n\n" for n, e in enumerate(events)]
