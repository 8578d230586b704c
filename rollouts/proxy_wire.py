"""Chat completions as plain data: what a program asks for, and what it is told. No network here.

What is not understood is refused with words for the program's author (`Refused`), never ignored in silence; the few settings that
change nothing here are named in `WITHOUT_EFFECT`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..agents.tools import parse_calls
from ..agents.types import Message, Turn, nearest

MAX_N = 64  # answers of one call
# `seed`: an episode's randomness follows from its own seed, or the episodes of a group would all be one.
WITHOUT_EFFECT = ("seed", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
                  "reasoning_effort", "verbosity", "prompt_cache_retention")  # fmt: skip
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
KNOWN = ("model", "messages", "n", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
         "tools", "tool_choice", "response_format", "structured_outputs", "logit_bias", *NUMBERS, *WITHOUT_EFFECT)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
GRAMMARS = ("json", "regex", "choice", "grammar", "json_object")  # of `structured_outputs`, as vLLM names them


class Refused(ValueError):
    """A request that gets an error for an answer: HTTP status, code and words."""

    def __init__(self, status: int, message: str, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """One call of a program. `model` is the name it gave; `messages` are its own words, with tool calls beside the text.

    `sampling` holds what it asked for beyond length, stop strings, grammar and bias; `tools` are schemas as OpenAI writes them; `forced`: it
    wants one of them called in any case.
    """

    model: str
    messages: tuple[Message, ...]
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    forced: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    grammar: str = ""
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    logprobs: bool = False
    stream: bool = False
    include_usage: bool = False


def read_chat(body: Any) -> Request:
    """The request of a body of `/chat/completions`."""
    if not isinstance(body, dict):
        raise Refused(400, "expected a JSON object")
    for key in body:
        if key not in KNOWN:
            raise Refused(400, f"{key}: not understood here; {nearest(str(key), KNOWN)}", "unknown_parameter")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: expected at least one")
    if body.get("top_logprobs"):
        raise Refused(400, "top_logprobs: only 0; the engine gives the log-probability of what was sampled")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none", "required") and not isinstance(choice, dict):
        raise Refused(400, f"tool_choice: expected auto, none, required or a tool, got {choice!r:.60}")
    stream, options = bool(body.get("stream")), body.get("stream_options") or {}
    limit = body.get("max_completion_tokens") if body.get("max_completion_tokens") is not None else body.get("max_tokens")
    return Request(
        model=text_of(body.get("model"), "model"),
        messages=tuple(read_message(m, f"messages[{i}]") for i, m in enumerate(messages)),
        n=whole(body.get("n"), "n", 1, MAX_N) or 1,
        max_tokens=whole(limit, "max_tokens", 1, 2**31),
        stop=read_stop(body.get("stop")),
        tools=() if choice == "none" else read_tools(body.get("tools")),
        forced=choice == "required" or isinstance(choice, dict),
        sampling={key: number(body[key], key) for key in NUMBERS if body.get(key) is not None},
        grammar=read_grammar(body),
        logit_bias=read_bias(body.get("logit_bias")),
        logprobs=bool(body.get("logprobs")),
        stream=stream,
        include_usage=stream and isinstance(options, dict) and bool(options.get("include_usage")),
    )


def read_message(data: Any, where: str) -> Message:
    if not isinstance(data, dict):
        raise Refused(400, f"{where}: expected an object")
    role = data.get("role")
    if role not in ROLES:
        raise Refused(400, f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r:.40}")
    calls = data.get("tool_calls") or []
    if not isinstance(calls, list):
        raise Refused(400, f"{where}.tool_calls: expected a list")
    return Message(
        ROLES[role],  # type: ignore[arg-type]
        plain_text(data.get("content"), f"{where}.content"),
        name=optional_text(data.get("name"), f"{where}.name"),
        tool_calls=tuple(_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)),
        tool_call_id=optional_text(data.get("tool_call_id"), f"{where}.tool_call_id"),
    )


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Refused(400, f"{where}: expected an object with a function")
    arguments = function.get("arguments") or "{}"
    return {
        "id": str(call.get("id") or ""),
        "name": text_of(function.get("name"), f"{where}.function.name"),
        "arguments": text_of(arguments, f"{where}.function.arguments"),
    }


def plain_text(content: Any, where: str) -> str:
    """Content as one text: None is "", parts are joined. Images and sound are refused."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refused(400, f"{where}: expected a text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise Refused(400, f"{where}: only text can be read here, got a part of type {kind!r:.40}")
        texts.append(text_of(part.get("refusal" if kind == "refusal" else "text"), where))
    return "".join(texts)


def read_stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or len(found) > 16 or not all(isinstance(s, str) and s for s in found):
        raise Refused(400, "stop: expected a text or at most 16 of them, none empty")
    return tuple(found)


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    found = value or []
    if not isinstance(found, list):
        raise Refused(400, "tools: expected a list")
    made = []
    for i, each in enumerate(found):
        function = each.get("function") if isinstance(each, dict) and each.get("type") == "function" else None
        if not isinstance(function, dict):
            raise Refused(400, f"tools[{i}]: expected an object of type function; others cannot be shown to a model here")
        name = text_of(function.get("name"), f"tools[{i}].function.name")
        described = {"name": name, "description": function.get("description") or ""}
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        made.append({"type": "function", "function": {**described, "parameters": parameters}})
    return tuple(made)


def read_grammar(body: Mapping[str, Any]) -> str:
    """What a reply is held to, in vLLM's words; "" if nothing."""
    form, given = body.get("response_format"), body.get("structured_outputs")
    if given is not None:
        if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in GRAMMARS:
            raise Refused(400, f"structured_outputs: expected an object with one of {', '.join(GRAMMARS)}")
        return json.dumps(given, sort_keys=True)
    if form is None:
        return ""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return ""
    if kind == "json_object":
        return json.dumps({"json_object": True})
    if kind == "json_schema":
        schema = form.get("json_schema", form).get("schema") if isinstance(form.get("json_schema", form), dict) else None
        if isinstance(schema, dict):
            return json.dumps({"json": schema}, sort_keys=True)
    raise Refused(400, "response_format: expected type text, json_object, or json_schema with a schema")


def read_bias(value: Any) -> dict[str, float]:
    if not isinstance(value or {}, dict) or not all(str(key).isdecimal() for key in value or {}):
        raise Refused(400, "logit_bias: expected an object from token ids to numbers")
    return {key: number(each, f"logit_bias[{key}]") for key, each in (value or {}).items()}


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Refused(400, f"{where}: expected a text, got {type(value).__name__}")
    return value


def optional_text(value: Any, where: str) -> str | None:
    return None if value is None else text_of(value, where)


def whole(value: Any, where: str, low: int, high: int) -> int | None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise Refused(400, f"{where}: expected a whole number from {low} to {high}, got {value!r:.40}")
    return value


def number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise Refused(400, f"{where}: expected a finite number, got {value!r:.40}")
    return float(value)


# answers


def shown(turn: Turn, request: Request) -> Message:
    """A turn as the program is shown it: without the stop string it ended with, tool calls beside the text.

    A call that cannot be read stays text: the program sees what was said.
    """
    text = turn.text
    ends = [at for stop in request.stop if (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    calls = [call for call in parse_calls(text) if "error" not in call] if request.tools else []
    if not calls:
        return Message("assistant", text)
    made = tuple(
        {
            "id": f"call_{turn.index}_{turn.sibling}_{number}",
            "name": call["name"],
            "arguments": call["arguments"]
            if isinstance(call["arguments"], str)
            else json.dumps(call["arguments"], ensure_ascii=False),
        }
        for number, call in enumerate(calls)
    )
    return Message("assistant", text[: text.index("<tool_call>")].rstrip(), tool_calls=made)


def usage(turns: Sequence[Turn]) -> dict[str, int]:
    """Tokens of one call: its prompt once, all its answers."""
    read, said = len(turns[0].prompt_ids), sum(len(turn.token_ids) for turn in turns)
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


def call_json(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}


def _logprobs(turn: Turn) -> dict[str, Any]:
    """Tokens by id, as vLLM writes them (`token_id:15`): what was sampled is ids, and some are no text alone."""
    pairs = zip(turn.token_ids, turn.logprobs, strict=True)
    return {
        "content": [{"token": f"token_id:{i}", "logprob": x, "bytes": None, "top_logprobs": []} for i, x in pairs],
        "refusal": None,
    }


def chat_completion(head: Mapping[str, Any], request: Request, turns: Sequence[Turn]) -> dict[str, Any]:
    """The reply to a call. `head`: its id and time."""
    choices = []
    for turn in turns:
        said = shown(turn, request)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.tool_calls:
            message |= {"content": said.content or None, "tool_calls": [call_json(call) for call in said.tool_calls]}
        choices.append(
            {
                "index": turn.sibling,
                "message": message,
                "logprobs": _logprobs(turn) if request.logprobs else None,
                "finish_reason": "tool_calls" if said.tool_calls else turn.finish_reason,
            }
        )
    return {**head, "object": "chat.completion", "model": request.model, "choices": choices, "usage": usage(turns)}


def chat_chunks(head: Mapping[str, Any], request: Request, turns: Sequence[Turn]) -> list[str]:
    """The same as server-sent events. The engine answers at once, so each answer is one piece."""
    whole_reply = chat_completion(head, request, turns)
    base = {**head, "object": "chat.completion.chunk", "model": request.model}

    def chunk(index: int, delta: Mapping[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {**base, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}

    chunks = []
    for choice in whole_reply["choices"]:
        message, at = choice["message"], choice["index"]
        delta = {"role": "assistant", "content": message["content"]}
        if "tool_calls" in message:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
        chunks += [chunk(at, delta, choice["logprobs"]), chunk(at, {}, None, choice["finish_reason"])]
    if request.include_usage:
        chunks.append({**base, "choices": [], "usage": whole_reply["usage"]})
    return [f"data: {json.dumps(each)}\n\n" for each in chunks] + ["data: [DONE]\n\n"]
