"""Completers: what samples the replies of a policy, an engine (by token ids and adapter version) or
a model behind an OpenAI-compatible address (by text)."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp

from ...agents.text.secrecy import check_url, usable_key, without
from ...agents.transcript import Call
from ...agents.types import BASE, Completion, PolicySpec, SettingError, to_json
from ..engines.base import Engine, EngineError, ModelRef, PromptTooLong
from ..http import Response, RetryPolicy, Transient, open_session, retry, send
from ..renderer import ChatRenderer

# how servers say that a prompt does not fit the model
TOO_LONG = re.compile(
    r"context_length_exceeded|context length|context window|too long|too many tokens", re.IGNORECASE
)


class Completer(Protocol):
    """Samples `call.n` replies to a chat, with the policy's adapter `version` ("" = the base)."""

    async def __call__(self, call: Call, version: str) -> list[Completion]: ...

    def most_prompt_tokens(self, call: Call) -> int:
        """The most tokens that the call's prompt can have."""
        ...


class EngineCompleter:
    """A policy that is served here: the chat becomes token ids once, and the engine samples with
    the adapter version of the call."""

    def __init__(self, engine: Engine, tokens: ChatRenderer, policy: str) -> None:
        self.engine, self.tokens, self.policy = engine, tokens, policy

    def prompt(self, call: Call) -> tuple[int, ...]:
        """Token ids of the chat, for the engine."""
        # A turn that was not sampled here has no tokens to continue: its text is encoded like any
        # other message.
        previous = call.previous if call.previous is not None and call.previous.token_ids else None
        return self.tokens.prompt(call.messages, previous)

    def most_prompt_tokens(self, call: Call) -> int:
        return len(self.prompt(call))

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        return await self.engine.generate(
            self.prompt(call), ModelRef(self.policy, version), call.sampling, call.n
        )


class APICompleter:
    """A model that is not served here, over `/chat/completions`. Its turns have text only, so they
    are never trained on.

    The key is read from the environment variable `MARLORA_OUTSIDE_KEY` (absent: none is sent). On
    429, 5xx, time-outs and lost connections a request is tried again, `tries` times in all, after
    about `pause` seconds and twice as long each time. Anything else raises `EngineError` with the
    server's message, but `PromptTooLong` where this says that the prompt does not fit.
    """

    def __init__(
        self, policy: PolicySpec, *, timeout: float = 120.0, tries: int = 4, pause: float = 1.0
    ) -> None:
        if not policy.url:
            raise SettingError(
                f"policy {policy.name!r}: url is empty; an outside model needs the address of"
                " its /v1"
            )
        check_url(f"policies.{policy.name}.url", policy.url)
        self.policy = policy
        self.retry = RetryPolicy(
            retries=tries - 1,
            backoff=2 * pause,
            longest=math.inf,
            request=timeout,
            jitter=(0.5, 1.0),
        )

    def _body(self, call: Call) -> dict[str, Any]:
        messages = [
            {k: v for k, v in to_json(m).items() if v not in (None, [])} for m in call.messages
        ]
        s = call.sampling
        if s.grammar or s.logit_bias:
            raise SettingError(
                f"policy {self.policy.name!r}: an outside model is asked without grammar and"
                " logit_bias; leave them out"
            )
        body = {
            "model": self.policy.base or self.policy.name,
            "messages": messages,
            "n": call.n,
            "temperature": s.temperature,
        }
        body |= {"top_p": s.top_p, "max_tokens": s.max_tokens, "seed": (s.seed or 0) % 2**31}
        body |= {"presence_penalty": s.presence_penalty, "frequency_penalty": s.frequency_penalty}
        return body | ({"stop": list(s.stop)} if s.stop else {})

    def most_prompt_tokens(self, call: Call) -> int:
        """A bound, for the server's tokenizer is not known here: a token holds at least a byte of
        the request, and a template adds a few per message and a head."""
        messages = self._body(call)["messages"]
        return len(json.dumps(messages, ensure_ascii=False).encode()) + 32 * len(messages) + 256

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        url = f"{str(self.policy.url).rstrip('/')}/chat/completions"
        key = usable_key(
            "environment variable MARLORA_OUTSIDE_KEY", os.environ.get("MARLORA_OUTSIDE_KEY", "")
        )
        body = self._body(call)
        async with open_session() as session:

            async def attempt() -> list[Completion]:
                return await send(
                    session,
                    "POST",
                    url,
                    lambda response: self._read(response, url, key),
                    body=body,
                    key=key,
                    seconds=self.retry.request,
                )

            try:
                return await retry(self.retry, attempt)
            except aiohttp.InvalidURL as error:
                raise SettingError(
                    f"policies.{self.policy.name}.url: {self.policy.url!r} is no address; expected"
                    " http://HOST:PORT/v1"
                ) from error
            except Transient as error:
                raise self._no_answer(url, str(error)) from error

    def _read(self, response: Response, url: str, key: str) -> list[Completion]:
        text = without(response.text, key)
        if response.status == 200:
            return self._completions(text, url)
        problem = f"{response.status} {text[:300]}"
        if response.status in (400, 413, 422) and TOO_LONG.search(text):
            raise PromptTooLong(f"policy {self.policy.name!r}: {url}: {problem}")
        if response.may_pass:
            raise Transient(problem)
        raise self._no_answer(url, problem)

    def _no_answer(self, url: str, problem: str) -> EngineError:
        return EngineError(
            f"policy {self.policy.name!r}: outside model at {url} did not answer: {problem}"
        )

    def _completions(self, text: str, url: str) -> list[Completion]:
        try:
            data = json.loads(text)
            return [
                Completion(
                    c["message"].get("content") or "",
                    finish_reason=c.get("finish_reason") or "stop",
                    policy=self.policy.name,
                )
                for c in data["choices"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"policy {self.policy.name!r}: {url} sent no chat completion ({error!r}):"
                f" {text[:300]}"
            ) from error


def completers(
    policies: Mapping[str, PolicySpec], engine_of: Mapping[str, tuple[Engine, ChatRenderer]]
) -> dict[str, Completer]:
    """A completer per policy. `engine_of` gives engine and renderer by policy name; outside models
    need none."""
    by_policy: dict[str, Completer] = {}
    for name, policy in policies.items():
        by_policy[name] = (
            APICompleter(policy) if policy.url else EngineCompleter(*engine_of[name], policy=name)
        )
    if BASE not in by_policy and BASE in engine_of:
        by_policy[BASE] = EngineCompleter(*engine_of[BASE], policy=BASE)
    return by_policy
