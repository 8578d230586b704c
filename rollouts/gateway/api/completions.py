"""Completions API, the one before chats: request and reply bodies of `/completions`.

The prompt is the user's message of a chat: the template of the model stands around it, and the
agent's own prompt before it, as for every other call. A program that writes a template's marks into
its prompt itself gets them as plain text, since text cannot forge a role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ....agents.types import Message, Turn
from .chat import (
    MAX_N,
    NUMBERS,
    WITHOUT_EFFECT,
    Request,
    check_unused,
    read_bias,
    read_sampling,
    read_stop,
    shown,
    usage,
)
from .fields import brief, check_body, flag, optional_mapping, text, whole, wrong

KNOWN = (
    "model",
    "prompt",
    "n",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "logit_bias",
    "echo",
    "suffix",
    "best_of",
    "logprobs",
    *NUMBERS,
    *WITHOUT_EFFECT,
)
USUAL_TOKENS = 16  # what the API samples where `max_tokens` is not given


def read_completion(body: Any) -> Request:
    """The request of a body of `/completions`."""
    check_body(body, KNOWN)
    check_unused(body)
    n = whole(body.get("n"), "n", 1, MAX_N) or 1
    _check_refused(body, n)
    options = optional_mapping(body.get("stream_options"), "stream_options")
    stream = flag(body.get("stream"), "stream")
    return Request(
        model=text(body.get("model"), "model"),
        messages=(Message("user", _prompt(body.get("prompt"))),),
        n=n,
        max_tokens=whole(body.get("max_tokens"), "max_tokens", 1, 2**31) or USUAL_TOKENS,
        stop=read_stop(body.get("stop")),
        sampling=read_sampling(body),
        logit_bias=read_bias(body.get("logit_bias")),
        stream=stream,
        include_usage=flag(options.get("include_usage"), "stream_options.include_usage") and stream,
        messages_field="prompt",
    )


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, str):
        problem = f"expected one text, got {brief(value)}; ask for each prompt in a call of its own"
        raise wrong("prompt", problem)
    return value


def _check_refused(body: Mapping[str, Any], n: int) -> None:
    """Refuse what would change the reply and is not done here."""
    if flag(body.get("echo"), "echo"):
        raise wrong("echo", "the prompt is not given back; put it before the reply yourself")
    if body.get("suffix"):
        raise wrong("suffix", "nothing can be filled in; expected none")
    if (whole(body.get("best_of"), "best_of", 1, MAX_N) or n) != n:
        raise wrong("best_of", "expected n: all answers are returned")
    if body.get("logprobs") is not None:
        problem = "not given here; /chat/completions gives those of the sampled tokens"
        raise wrong("logprobs", problem)


def completion(head: Mapping[str, Any], request: Request, turns: Sequence[Turn]) -> dict[str, Any]:
    """The body of a reply. `head`: its id and time."""
    choices = [
        {
            "index": turn.sibling,
            "text": shown(turn, request).content,
            "logprobs": None,
            "finish_reason": turn.finish_reason,
        }
        for turn in turns
    ]
    return {
        **head,
        "object": "text_completion",
        "model": request.model,
        "choices": choices,
        "usage": usage(turns),
    }


def completion_chunks(
    head: Mapping[str, Any], request: Request, turns: Sequence[Turn]
) -> list[str]:
    """The reply as server-sent events; each answer is one chunk."""
    whole_reply = completion(head, request, turns)
    base = {key: each for key, each in whole_reply.items() if key not in ("choices", "usage")}
    chunks = [{**base, "choices": [choice]} for choice in whole_reply["choices"]]
    if request.include_usage:
        chunks.append({**base, "choices": [], "usage": whole_reply["usage"]})
    return [f"data: {json.dumps(each)}\n\n" for each in chunks] + ["data: [DONE]\n\n"]
