"""Bodies of requests to `/v1/completions`, and the checks of its replies. No network here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ....agents.types import Sampling
from ...http import Transient
from ..base import EngineError


def request_body(
    ids: Sequence[int], model: str, sampling: Sampling, n: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """A request with nothing left to a default. `logprobs` 0 asks for the sampled token's own."""
    shaped: dict[str, Any] = (
        {"structured_outputs": json.loads(sampling.grammar)} if sampling.grammar else {}
    )
    shaped |= {"logit_bias": dict(sampling.logit_bias)} if sampling.logit_bias else {}
    return shaped | {
        "model": model,
        "prompt": list(ids),
        "n": n,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,  # 0 is off, for us and for vLLM
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        # a grammar ends with whatever the model's own files call an end; going on after it, a reply
        # would follow no grammar
        "ignore_eos": not sampling.grammar,
        "stop_token_ids": list(eos_ids),
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }


Reply = tuple[tuple[int, ...], tuple[float, ...], str]


def read_choices(
    reply: Any, *, model: str, prompt: list[int], n: int, max_tokens: int
) -> list[Reply]:
    """(token ids, log-probs, finish reason) of each sibling, in order.

    Raises `Transient` for a reply that is not whole, `EngineError` if another model answered.
    """
    choices = _choices(reply, model, prompt, n)
    replies = []
    for choice in choices:
        tokens, logprobs = (
            choice.get("token_ids"),
            (choice.get("logprobs") or {}).get("token_logprobs"),
        )
        if not isinstance(tokens, list) or not isinstance(logprobs, list):
            raise Transient(
                "a choice has no token_ids or no logprobs; vLLM 0.20 or newer is needed"
            )
        if not 0 < len(tokens) <= max_tokens or len(tokens) != len(logprobs):
            raise Transient(
                f"{len(tokens)} tokens with {len(logprobs)} logprobs, for max_tokens {max_tokens}"
            )
        if not all(type(token) is int for token in tokens) or not all(
            _is_logprob(value) for value in logprobs
        ):
            raise Transient(
                "a token that is no integer, or a log-probability that is no finite number"
            )
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise Transient(f"the reply ended with {reason!r}")
        replies.append((tuple(tokens), tuple(map(float, logprobs)), reason))
    return replies


def read_scores(reply: Any, *, model: str, prompt: list[int]) -> list[float]:
    """Log-probabilities of prompt[1:]. Raises as `read_choices`."""
    entries = _choices(reply, model, prompt, 1)[0].get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(prompt):
        raise Transient("prompt_logprobs are missing or not as many as the prompt's tokens")
    values = [
        entry.get(str(token), {}).get("logprob")
        for token, entry in zip(prompt[1:], entries[1:], strict=True)
    ]
    if not all(_is_logprob(value) for value in values):
        raise Transient("prompt_logprobs lack a token of the prompt, or one is no finite number")
    return values


def _choices(reply: Any, model: str, prompt: list[int], n: int) -> list[dict[str, Any]]:
    try:
        if reply["model"] != model:
            raise EngineError(
                f"asked for {model!r}, answered by {reply['model']!r}: the server's adapters are"
                " not what we loaded"
            )
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(n)):
            raise Transient(
                f"{n} choices expected, got indices {[choice['index'] for choice in choices]}"
            )
        if any(choice.get("prompt_token_ids") != prompt for choice in choices):
            raise Transient("the prompt's tokens did not come back as they were sent")
        return choices
    except (KeyError, TypeError, AttributeError) as error:
        raise Transient(f"the reply has not the form of a completion: {error!r}") from error


def _is_logprob(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value < 1e-3
    )
