"""Chat Completions request and reply bodies, as plain data. No network.

A field that is not understood is refused with an error for the program's author (`BadRequest`),
never ignored silently; the few settings that have no effect are listed in `WITHOUT_EFFECT`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....agents.tools.calls import call_spans
from ....agents.tools.tools import parse_calls
from ....agents.types import Message, Turn
from .fields import (
    MAX_ITEMS,
    brief,
    check_body,
    flag,
    inside,
    items,
    mapping,
    number,
    one_of,
    optional_mapping,
    optional_text,
    text,
    whole,
    wrong,
)
from .tools import call_json, read_call, read_choice, read_grammar, read_tools

MAX_N = 64  # answers of one call
# `seed`: an episode's randomness follows from its own seed, or the episodes of a group would all be
# one.
WITHOUT_EFFECT = (
    "seed",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
    "prompt_cache_retention",
)
UNUSED_TEXTS = (
    "user",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "reasoning_effort",
    "verbosity",
    "prompt_cache_retention",
)
NUMBERS = {  # the least and the greatest that an engine takes
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 2**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
LIMITS = ("max_completion_tokens", "max_tokens")  # the first that is given
KNOWN = (
    "model",
    "messages",
    "n",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "logit_bias",
    *NUMBERS,
    *WITHOUT_EFFECT,
)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
PARTS = ("text", "input_text", "output_text", "refusal")
MAX_STOPS = 16
TOKEN_ID = re.compile("[0-9]{1,10}")


@dataclass(frozen=True)
class Request:
    """One request of a program, of any API.

    Args:
        model: the name it gave.
        messages: as it sent them, tool calls beside the text. `messages_field`: the field they were
            in, for errors.
        sampling: what it asked for beyond length, stop strings, grammar and bias.
        tools: schemas as OpenAI writes them. forced: a call of one of them is required.
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
    messages_field: str = "messages"


def read_chat(body: Any) -> Request:
    """The request of a body of `/chat/completions`."""
    check_body(body, KNOWN)
    check_unused(body)
    messages = items(body.get("messages"), "messages")
    if not messages:
        raise wrong("messages", "expected at least one")
    if whole(body.get("top_logprobs"), "top_logprobs", 0, MAX_N):
        problem = "only 0; the engine gives the log-probability of what was sampled"
        raise wrong("top_logprobs", problem)
    limits = [whole(body.get(key), key, 1, 2**31) for key in LIMITS]
    tools, choice = read_tools(body.get("tools")), read_choice(body.get("tool_choice"))
    options = optional_mapping(body.get("stream_options"), "stream_options")
    usage_too = flag(options.get("include_usage"), "stream_options.include_usage")
    stream = flag(body.get("stream"), "stream")
    return Request(
        model=text(body.get("model"), "model"),
        messages=tuple(read_message(m, f"messages[{i}]") for i, m in enumerate(messages)),
        n=whole(body.get("n"), "n", 1, MAX_N) or 1,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        stop=read_stop(body.get("stop")),
        tools=() if choice == "none" else tools,
        forced=choice == "required",
        sampling=read_sampling(body),
        grammar=read_grammar(body),
        logit_bias=read_bias(body.get("logit_bias")),
        logprobs=flag(body.get("logprobs"), "logprobs"),
        stream=stream,
        include_usage=stream and usage_too,
    )


def check_unused(body: Mapping[str, Any]) -> None:
    """Check the types of settings without effect; raises `BadRequest` for a wrong one."""
    whole(body.get("seed"), "seed", -(2**63), 2**64)
    for key in ("store", "parallel_tool_calls"):
        flag(body.get(key), key)
    for key in UNUSED_TEXTS:
        optional_text(body.get(key), key)
    for key, each in optional_mapping(body.get("metadata"), "metadata").items():
        text(each, inside("metadata", key))


def read_sampling(body: Mapping[str, Any]) -> dict[str, float]:
    """Temperature and the like, those that are given."""
    sampling = {
        key: number(body[key], key, low, high)
        for key, (low, high) in NUMBERS.items()
        if body.get(key) is not None
    }
    if not sampling.get("top_k", 0.0).is_integer():
        raise wrong("top_k", f"expected a whole number, got {brief(body['top_k'])}")
    return sampling


def read_message(data: Any, where: str) -> Message:
    """One message of a chat."""
    mapping(data, where)
    role = ROLES[one_of(data.get("role"), f"{where}.role", ROLES)]
    calls = items(data.get("tool_calls"), f"{where}.tool_calls")
    return Message(
        role,  # type: ignore[arg-type]
        plain_text(data.get("content"), f"{where}.content"),
        name=optional_text(data.get("name"), f"{where}.name"),
        tool_calls=tuple(
            read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ),
        tool_call_id=optional_text(data.get("tool_call_id"), f"{where}.tool_call_id"),
    )


def plain_text(content: Any, where: str) -> str:
    """Content as one text: None is "", parts are joined. Images and sound are refused."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(where, f"expected a text or a list of parts, got {brief(content)}")
    texts = []
    for i, part in enumerate(items(content, where)):
        kind = mapping(part, f"{where}[{i}]").get("type")
        if not isinstance(kind, str) or kind not in PARTS:
            problem = f"only text can be read here, got a part of type {brief(kind)}"
            raise wrong(f"{where}[{i}].type", problem)
        key = "refusal" if kind == "refusal" else "text"
        texts.append(text(part.get(key), f"{where}[{i}].{key}"))
    return "".join(texts)


def read_stop(value: Any, field: str = "stop") -> tuple[str, ...]:
    """Stop strings of a field."""
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise wrong(field, f"expected a text or at most {MAX_STOPS} of them, none empty")
    for i, each in enumerate(stops):
        if not isinstance(each, str) or not each:
            where = field if isinstance(value, str) else f"{field}[{i}]"
            raise wrong(where, f"expected a text that is not empty, got {brief(each)}")
    return tuple(stops)


def read_bias(value: Any) -> dict[str, float]:
    """`logit_bias`, by token id as text."""
    given = optional_mapping(value, "logit_bias")
    if len(given) > MAX_ITEMS:
        raise wrong("logit_bias", f"expected at most {MAX_ITEMS} entries, got {len(given)}")
    for key in given:
        if not TOKEN_ID.fullmatch(key):
            raise wrong(
                "logit_bias", f"expected an object from token ids to numbers, got {key[:40]!r}"
            )
    return {key: number(each, f"logit_bias[{key}]") for key, each in given.items()}


# answers


def shown(turn: Turn, request: Request) -> Message:
    """A turn as the program gets it: without the stop string at its end, tool calls beside the
    text. A call that cannot be parsed stays text.
    """
    text = turn.text
    ends = [at for stop in request.stop if (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    calls = [call for call in parse_calls(text) if "error" not in call] if request.tools else []
    if not calls:
        return Message("assistant", text)
    tool_calls = tuple(
        {
            "id": f"call_{turn.index}_{turn.sibling}_{number}",
            "name": call["name"],
            "arguments": (
                call["arguments"]
                if isinstance(call["arguments"], str)
                else json.dumps(call["arguments"], ensure_ascii=False)
            ),
        }
        for number, call in enumerate(calls)
    )
    return Message("assistant", text[: call_spans(text)[0].start].rstrip(), tool_calls=tool_calls)


def usage(turns: Sequence[Turn]) -> dict[str, int]:
    """Tokens of one call: its prompt once, all its answers; of an outside model those that its
    server reports."""
    prompt, sampled = len(turns[0].prompt_ids), sum(len(turn.token_ids) for turn in turns)
    if (reported := turns[0].usage) is not None:
        prompt, sampled = reported.prompt_tokens, reported.sampled_tokens
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprobs(turn: Turn) -> dict[str, Any]:
    """Tokens by id, as vLLM writes them (`token_id:15`): what was sampled is ids, and some are no
    text alone."""
    pairs = zip(turn.token_ids, turn.logprobs, strict=True)
    return {
        "content": [
            {"token": f"token_id:{i}", "logprob": x, "bytes": None, "top_logprobs": []}
            for i, x in pairs
        ],
        "refusal": None,
    }


def chat_completion(
    head: Mapping[str, Any], request: Request, turns: Sequence[Turn]
) -> dict[str, Any]:
    """The body of a reply. `head`: its id and time."""
    choices = []
    for turn in turns:
        answer = shown(turn, request)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.tool_calls:
            message |= {
                "content": answer.content or None,
                "tool_calls": [call_json(call) for call in answer.tool_calls],
            }
        choices.append(
            {
                "index": turn.sibling,
                "message": message,
                "logprobs": _logprobs(turn) if request.logprobs else None,
                "finish_reason": "tool_calls" if answer.tool_calls else turn.finish_reason,
            }
        )
    return {
        **head,
        "object": "chat.completion",
        "model": request.model,
        "choices": choices,
        "usage": usage(turns),
    }


def chat_chunks(head: Mapping[str, Any], request: Request, turns: Sequence[Turn]) -> list[str]:
    """The reply as server-sent events. The engine returns whole answers, so each is one chunk."""
    whole_reply = chat_completion(head, request, turns)
    base = {**head, "object": "chat.completion.chunk", "model": request.model}

    def chunk(
        index: int, delta: Mapping[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {
            **base,
            "choices": [
                {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            ],
        }

    chunks = []
    for choice in whole_reply["choices"]:
        message, at = choice["message"], choice["index"]
        delta = {"role": "assistant", "content": message["content"]}
        if "tool_calls" in message:
            delta["tool_calls"] = [
                {"index": i, **call} for i, call in enumerate(message["tool_calls"])
            ]
        chunks += [
            chunk(at, delta, choice["logprobs"]),
            chunk(at, {}, None, choice["finish_reason"]),
        ]
    if request.include_usage:
        chunks.append({**base, "choices": [], "usage": whole_reply["usage"]})
    return [f"data: {json.dumps(each)}\n\n" for each in chunks] + ["data: [DONE]\n\n"]
