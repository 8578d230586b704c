"""Who answers for a policy: an engine that knows tokens and versions, or an outside model behind an
OpenAI-compatible address."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Mapping
from typing import Any, Protocol

from ...agents.secrecy import check_url, usable_key, without
from ...agents.types import BASE, Call, Completion, PolicySpec, SettingError, to_json
from ..engines.base import Engine, EngineError, ModelRef, PromptTooLong
from ..renderer import ChatRenderer

# how servers say that a prompt does not fit the model
TOO_LONG = re.compile(
    r"context_length_exceeded|context length|context window|too long|too many tokens", re.IGNORECASE
)


class Completer(Protocol):
    async def __call__(self, call: Call, version: str) -> list[Completion]: ...


class EngineCompleter:
    """A policy of ours: the chat becomes token ids once, and the engine answers with the adapter
    version it is told."""

    def __init__(self, engine: Engine, tokens: ChatRenderer, policy: str) -> None:
        self.engine, self.tokens, self.policy = engine, tokens, policy

    def prompt(self, call: Call) -> tuple[int, ...]:
        """What the engine is to read."""
        # A written or outside turn has no tokens to go on from: its text is encoded like any other
        # message.
        previous = call.previous if call.previous is not None and call.previous.token_ids else None
        return self.tokens.prompt(call.messages, previous)

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        return await self.engine.generate(
            self.prompt(call), ModelRef(self.policy, version), call.sampling, call.n
        )


class APICompleter:
    """A model that we do not serve, over `/chat/completions`. Its turns have text only, so they are
    never trained on.

    The key is read from the environment variable `MARLORA_OUTSIDE_KEY` (absent: none is sent). On
    429, 5xx, time-outs and lost connections a request is tried again, `tries` times in all, after
    `pause` seconds and twice as long each time. Anything else raises `EngineError` with the
    server's words, but `PromptTooLong` where these say that the prompt does not fit.
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
        self.policy, self.timeout, self.tries, self.pause = policy, timeout, tries, pause

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

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        import aiohttp

        url = f"{str(self.policy.url).rstrip('/')}/chat/completions"
        key = usable_key(
            "environment variable MARLORA_OUTSIDE_KEY", os.environ.get("MARLORA_OUTSIDE_KEY", "")
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                await asyncio.sleep(random.uniform(0.5, 1.0) * self.pause * 2**attempt)
            try:
                timeout = aiohttp.ClientTimeout(total=self.timeout)
                async with (
                    aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                    session.post(url, json=self._body(call)) as response,
                ):
                    text = without(await response.text(errors="replace"), key)
                    if response.status == 200:
                        return self._completions(text, url)
                    problem = f"{response.status} {text[:300]}"
                    if response.status in (400, 413, 422) and TOO_LONG.search(text):
                        raise PromptTooLong(f"policy {self.policy.name!r}: {url}: {problem}")
                    if response.status != 429 and response.status < 500:
                        break
            except aiohttp.InvalidURL as error:
                raise SettingError(
                    f"policies.{self.policy.name}.url: {self.policy.url!r} is no address; expected"
                    " http://HOST:PORT/v1"
                ) from error
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__} {error}"
        raise EngineError(
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
    """A speaker per policy. `engine_of` gives engine and tokens by policy name; outside policies
    need none."""
    found: dict[str, Completer] = {}
    for name, policy in policies.items():
        found[name] = (
            APICompleter(policy) if policy.url else EngineCompleter(*engine_of[name], policy=name)
        )
    if BASE not in found and BASE in engine_of:
        found[BASE] = EngineCompleter(*engine_of[BASE], policy=BASE)
    return found
