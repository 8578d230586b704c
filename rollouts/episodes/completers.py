"""Completers: what samples the replies of a policy, an engine (by token ids and adapter version) or
a model behind an OpenAI-compatible address (by text)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import aiohttp

from ...agents.text.secrecy import OUTSIDE_KEY, check_url, usable_key, without
from ...agents.transcript import Call
from ...agents.types import BASE, Completion, PolicySpec, SettingError, Usage, to_json
from ..engines.base import Engine, EngineError, ModelRef, PromptTooLong
from ..engines.vllm.discovery import key_from
from ..http import Response, RetryPolicy, Transient, open_session, retry, send
from ..renderer import ChatRenderer

log = logging.getLogger(__name__)

# how servers say that a prompt does not fit the model
TOO_LONG = re.compile(
    r"context_length_exceeded|context length|context window|too long|too many tokens", re.IGNORECASE
)


class Completer(Protocol):
    """Samples `call.n` replies to a chat, with the policy's adapter `version` ("" = the base)."""

    async def __call__(self, call: Call, version: str) -> list[Completion]: ...

    @property
    def outside(self) -> bool:
        """Is the model served by somebody else, who may charge for a call that was given up?"""
        ...

    def most_prompt_tokens(self, call: Call) -> int:
        """The most tokens that the call's prompt can have."""
        ...


class AnswerLost(EngineError):
    """An outside model's answer did not come (a time-out, a lost connection). Its server may have
    served the request and charged it, so asking again is another call; `pause` seconds before
    that are polite."""

    def __init__(self, message: str, pause: float) -> None:
        super().__init__(message)
        self.pause = pause


class EngineCompleter:
    """A policy that is served here: the chat becomes token ids once, and the engine samples with
    the adapter version of the call."""

    outside = False

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

    The key is read from the environment variable or file that `key_env` of the policy names, else
    from the environment variable `MARLORA_OUTSIDE_KEY` (absent: none is sent). On 429, 5xx and
    connections that did not come about a request is tried again, `tries` times in all, after about
    `pause` seconds and twice as long each time. Raises `AnswerLost` for time-outs and connections
    lost on the way, `PromptTooLong` where the server says that the prompt does not fit, and for
    anything else `EngineError` with the server's message.

    The first completion of a request carries its usage as the server reports it. A number that the
    server does not report, or that cannot be true, is the most it can be (all of `max_tokens` was
    sampled; `most_prompt_tokens`): so a budget counts too much where it cannot know, and never too
    little. The first such report is logged as a warning.
    """

    outside = True

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
        self.key()  # one that is not there is said at the start
        self._template = 256  # tokens that a template or the server adds to a prompt
        self._warned = set[str]()
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

    @property
    def url(self) -> str:
        return f"{str(self.policy.url).rstrip('/')}/chat/completions"

    def key(self) -> str:
        """The key that is sent, "" for none. Raises `SettingError` where `key_env` names none, or
        what no header can carry."""
        if self.policy.key_env:
            return key_from(self.policy.key_env, f"policy {self.policy.name!r}: key_env")
        return usable_key(f"environment variable {OUTSIDE_KEY}", os.environ.get(OUTSIDE_KEY, ""))

    def most_prompt_tokens(self, call: Call) -> int:
        """A bound, for the server's tokenizer is not known here: each token holds at least a byte
        of the request, in whichever of Unicode's forms; a template adds a few tokens per message,
        and a head (256 tokens, or what a report has shown beyond that)."""
        messages = self._body(call)["messages"]
        return _most_bytes(messages) + 32 * len(messages) + self._template

    async def __call__(self, call: Call, version: str) -> list[Completion]:
        key = self.key()
        body = self._body(call)
        async with open_session() as session:

            async def attempt() -> list[Completion]:
                return await send(
                    session,
                    "POST",
                    self.url,
                    lambda response: self._read(response, call, key),
                    body=body,
                    key=key,
                    seconds=self.retry.request,
                )

            try:
                return await retry(self.retry, attempt, _may_be_served)
            except aiohttp.InvalidURL as error:
                raise SettingError(
                    f"policies.{self.policy.name}.url: {self.policy.url!r} is no address; expected"
                    " http://HOST:PORT/v1"
                ) from error
            except Transient as error:
                problem = self._no_answer(str(error))
                if _may_be_served(error):
                    raise AnswerLost(problem, self.retry.pause(1)) from error
                raise EngineError(problem) from error

    def _read(self, response: Response, call: Call, key: str) -> list[Completion]:
        text = without(response.text, key)
        if response.status == 200:
            return self._completions(text, call)
        problem = f"{response.status} {' '.join(text[:300].split())}"
        if response.status in (400, 413, 422) and TOO_LONG.search(text):
            raise PromptTooLong(f"policy {self.policy.name!r}: {self.url}: {problem}")
        if response.may_pass:
            raise Transient(problem)
        if response.status in (401, 403):
            raise EngineError(self._refusal(problem, key))
        raise EngineError(self._no_answer(problem))

    def _refusal(self, problem: str, key: str) -> str:
        """The words of an error for a key that the server does not take."""
        name = self.policy.key_env or OUTSIDE_KEY
        what = f"the key in {name}" if key else f"a request without a key ({name} is not set)"
        return (
            f"policy {self.policy.name!r}: {self.url} refuses {what}: {problem}; put a key there"
            " that this server takes, or name another environment variable with key_env"
        )

    def _no_answer(self, problem: str) -> str:
        return f"policy {self.policy.name!r}: outside model at {self.url} did not answer: {problem}"

    def _completions(self, text: str, call: Call) -> list[Completion]:
        try:
            data = json.loads(text)
            completions = [
                Completion(
                    c["message"].get("content") or "",
                    finish_reason=c.get("finish_reason") or "stop",
                    policy=self.policy.name,
                )
                for c in data["choices"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"policy {self.policy.name!r}: {self.url} sent no chat completion ({error!r}):"
                f" {text[:300]}"
            ) from error
        usage = self._usage(data.get("usage"), completions, call)
        return [
            dataclasses.replace(completion, usage=None if position else usage)
            for position, completion in enumerate(completions)
        ]

    def _usage(self, report: Any, completions: Sequence[Completion], call: Call) -> Usage:
        """What a request has cost by its server's report (see the class)."""
        bound = self.most_prompt_tokens(call)
        most = Usage(1, bound, call.n * call.sampling.max_tokens)
        usage, faults = read_usage(report, most, least=sum(bool(c.text) for c in completions))
        if faults:
            self._warn(
                "report",
                f"sends a report of its usage with {', '.join(faults)}; the most that it can be is"
                " counted instead",
            )
        if usage.prompt_tokens > bound:
            self._template += usage.prompt_tokens - bound
            self._warn(
                "template",
                f"reports {usage.prompt_tokens} tokens of a prompt that has {bound} at most; later"
                " calls allow for that, a budget may have been exceeded by this one",
            )
        return usage

    def _warn(self, what: str, text: str) -> None:
        """Say something of the server, once."""
        if what not in self._warned:
            self._warned.add(what)
            log.warning("policy %r: %s %s", self.policy.name, self.url, text)


def _may_be_served(error: Transient) -> bool:
    """May the server have done what it was asked? It has not where it said so, or where there was
    no connection."""
    return error.__cause__ is not None and not isinstance(
        error.__cause__, aiohttp.ClientConnectorError
    )


def _most_bytes(messages: Any) -> int:
    """The most bytes that JSON has in any of Unicode's forms: some tokenizers bring texts into one
    of them, which may be longer."""
    text = json.dumps(messages, ensure_ascii=False)
    forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD"))]
    return max(len(form.encode(errors="surrogatepass")) for form in forms)


def read_usage(report: Any, most: Usage, least: int) -> tuple[Usage, list[str]]:
    """The `usage` of a chat completion, and what of it cannot be used.

    Args:
        most: taken where the report has no such number.
        least: the fewest tokens that can have been sampled.
    """
    faults: list[str] = []
    fields = report if isinstance(report, Mapping) else {}

    def count(of: Mapping[str, Any], name: str, least: int, instead: int) -> int:
        value = of.get(name)
        if type(value) is int and value >= least:
            return value
        faults.append(f"{name} {value!r:.40}" if name in of else f"no {name}")
        return instead

    prompt = count(fields, "prompt_tokens", 1, most.prompt_tokens)
    sampled = count(fields, "completion_tokens", least, most.sampled_tokens)
    details = fields.get("prompt_tokens_details")
    cached = 0
    if isinstance(details, Mapping) and details.get("cached_tokens") is not None:
        cached = count(details, "cached_tokens", 0, 0)
    if cached > prompt:
        faults.append(f"cached_tokens {cached} of a prompt of {prompt}")
        cached = 0
    return Usage(1, prompt, sampled, cached_tokens=cached), faults


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
