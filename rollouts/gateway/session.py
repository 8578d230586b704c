"""One episode's side of the door: whose calls these are, which chat a call goes on with, and which
call is only sent again.

A program keeps its chats itself and sends them whole. A call whose messages begin with those of an
earlier call and the answer it was shown goes on with that chat, token for token; any other call
starts a new one. Turns are numbered in the order in which calls arrive.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ...agents.team import Agent, Team
from ...agents.text.answers import stands_in
from ...agents.tools.tools import schemas_prompt
from ...agents.types import LimitError, Message, Sampling, SettingError, Turn, nearest
from ..engines.base import PromptTooLong
from .chat_api import Request, shown
from .fields import BadRequest, loaded, wrong
from .rewards import read_rewards

T = TypeVar("T")


class Connection(Protocol):
    """What is asked of an open request: whether its sender is still there."""

    @property
    def transport(self) -> asyncio.Transport | None: ...


@dataclass(eq=False)
class Asked:
    """A call, whoever waits for its answer. `body` is a hash of what was asked, `key` its
    Idempotency-Key."""

    body: str
    key: str
    request: Request
    answer: asyncio.Task[tuple[Turn, ...]]
    created: int = field(default_factory=lambda: int(time.time()))
    delivered: bool = False
    waiting: list[Connection] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.answer.done() and (
            self.answer.cancelled() or self.answer.exception() is not None
        )

    @property
    def abandoned(self) -> bool:
        """Every connection that asked for it broke before the reply was sent."""
        return not self.delivered and all(disconnected(connection) for connection in self.waiting)


def disconnected(connection: Connection) -> bool:
    return connection.transport is None or connection.transport.is_closing()


class Session:
    """A program in an episode.

    Args:
        team: answers; its turns are the record.
        models: other names than the agents' own that a program may call them by.
        keep_sampling: temperature and the like are the program's where it names them; else they are
            the run's alone.
        unforced_tools: a call of a tool that the program wants to force is the agent's own to make;
            else such a request is refused.
    """

    def __init__(
        self,
        team: Team,
        models: Mapping[str, str] | None = None,
        *,
        keep_sampling: bool = False,
        unforced_tools: bool = False,
    ) -> None:
        self.team, self.models, self.keep_sampling, self.unforced_tools = (
            team,
            dict(models or {}),
            keep_sampling,
            unforced_tools,
        )
        self.id, self.key = secrets.token_hex(12), secrets.token_urlsafe(24)
        self.base_url = ""  # the door's to say
        self.closed = False
        self.asked: list[Asked] = []
        self.posted = asyncio.Event()  # a reward from outside has come
        self.too_long: PromptTooLong | None = None
        self._fatal: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._ended: dict[str, Turn] = {}  # chat as the program knows it -> the turn that ended it
        self._went_on: set[int] = set()
        self._remembered: dict[str, tuple[Message, ...]] = {}  # chats by the id of a response

    # who is asked

    def agent(self, model: str) -> Agent:
        """The agent that a program calls by this name. Raises `Refused` with the names there
        are."""
        known = {agent.name: agent.name for agent in self.team} | self.models
        name = model.removeprefix("agent:")
        if name not in known:
            told = f"no such agent; {nearest(name[:80], list(known))} (all: {', '.join(known)})"
            raise BadRequest(404, f"model {model[:80]!r}: {told}", "model_not_found", "model")
        return self.team[known[name]]

    def names(self) -> list[str]:
        return [*(agent.name for agent in self.team), *self.models]

    # calls

    def ask(
        self,
        data: Any,
        request: Request,
        connection: Connection,
        *,
        key: str = "",
        retries: int | None = None,
    ) -> Asked:
        """The call that this request is: a new one, whose turn's index is taken now, or an earlier
        one sent again.

        A request is sent again if it has the `key` of an earlier one; if it says so itself
        (`retries` > 0) and its body is equal; if its body is equal and the earlier one's connection
        broke before its reply was sent; or if its body is equal while the earlier one is open and
        it does not say of itself that it is new (`retries` 0).
        """
        body = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
        call = self._earlier(body, key, retries)
        if call is None:
            agent = self.agent(request.model)
            try:
                numbered = self._call(agent, request)
            except LimitError as error:
                self.fail(error)
                raise BadRequest(429, str(error), "episode_over") from error
            answer = asyncio.ensure_future(self._answer(numbered))
            call = Asked(body, key, request, answer)
            answer.add_done_callback(lambda done: self._remember(agent, call, done))
            self.asked.append(call)
        call.waiting.append(connection)
        return call

    def _earlier(self, body: str, key: str, retries: int | None) -> Asked | None:
        for call in reversed(self.asked):
            if key and call.key == key and not call.failed:
                if call.body != body:
                    raise BadRequest(
                        422,
                        f"Idempotency-Key {key[:40]!r} was used for another request",
                        "idempotency_error",
                    )
                return call
        for call in reversed(self.asked):
            if call.body != body or call.failed or (key and call.key):
                continue
            again = bool(retries) or call.abandoned or (retries is None and not call.answer.done())
            if again:
                return call
        return None

    def _call(self, agent: Agent, request: Request) -> Awaitable[Turn]:
        """Number the call; awaiting it gives the taken turn."""
        if request.forced and not self.unforced_tools:
            told = "a call cannot be forced here; system.unforced_tools takes it for auto"
            raise wrong("tool_choice", told)
        previous, new = self._goes_on(agent, request)
        spoken = tuple(spoken_message(message) for message in request.messages[new:])
        if previous is None:
            messages = opening(self.team, agent, spoken, request.tools)
        else:
            messages = (*previous.messages, Message("assistant", previous.text), *spoken)
        if messages and messages[-1].role == "assistant":
            raise wrong(request.said_in, "the last one is the assistant's; expected one to answer")
        sampling = self._sampling(agent, request)
        # Nothing is refused from here on: what follows goes on record.
        if previous is not None and previous.index not in self._went_on:
            self.team.settle(previous)  # the first of its siblings that is gone on with
            self._went_on.add(previous.index)
        reads = read_turns(self.team.turns, spoken, previous)
        return agent.answer(messages, previous, reads=reads, n=request.n, sampling=sampling)

    def _sampling(self, agent: Agent, request: Request) -> Sampling:
        base = agent.spec.sampling or self.team.sampling
        asked: dict[str, Any] = {
            "stop": (*base.stop, *request.stop),
            "grammar": request.grammar,
            "logit_bias": request.logit_bias,
        }
        if request.max_tokens is not None:
            asked["max_tokens"] = min(base.max_tokens, request.max_tokens)
        if self.keep_sampling:
            if request.sampling.get("top_p") == 0:  # harmless where it has no effect
                raise wrong("top_p", "expected a number above 0, got 0")
            asked |= request.sampling
            asked["top_k"] = max(0, int(asked.get("top_k", base.top_k)))  # -1, as vLLM says it: off
        return replace(base, **asked)

    async def _answer(self, call: Awaitable[Turn]) -> tuple[Turn, ...]:
        """All siblings of a call. What concerns the run or the episode ends the episode; the rest
        is an error for the program."""
        try:
            return self.team.siblings(await call)
        except PromptTooLong as error:
            self.too_long = error
            raise BadRequest(400, str(error), "context_length_exceeded") from error
        except SettingError as error:
            raise BadRequest(400, str(error)) from error
        except Exception as error:
            self.fail(error)
            raise BadRequest(500, "the episode is over", "episode_over") from error

    def fail(self, error: BaseException) -> None:
        """End the episode with this error, whatever the program makes of it."""
        if not self._fatal.done():
            self._fatal.set_result(error)

    async def guard(self, work: Awaitable[T]) -> T:
        """The program's result, unless the episode failed meanwhile: then the program is cancelled
        and that error raised.

        A program that fails after a prompt did not fit has failed for that reason.
        """
        task = asyncio.ensure_future(work)
        try:
            waited: list[asyncio.Future[Any]] = [task, self._fatal]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._fatal.done():
                raise self._fatal.result()
            try:
                return await task
            except Exception as error:
                if self.too_long is not None:
                    raise self.too_long from error
                raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Open calls are cancelled; turns whose reply nobody got are on record as not taken."""
        self.closed = True
        await asyncio.sleep(
            0
        )  # a call that came this very moment starts, so that it can be cancelled
        for call in self.asked:
            call.answer.cancel()
        await asyncio.gather(*(call.answer for call in self.asked), return_exceptions=True)
        for call in self.asked:
            if not call.delivered and not call.failed:
                for turn in call.answer.result():
                    self.team.settle(turn, taken=False)

    # chats

    def _goes_on(self, agent: Agent, request: Request) -> tuple[Turn | None, int]:
        """The turn that the longest known beginning of these messages ended with, and how many
        messages that is."""
        found, count = None, 0
        for number, (message, digest) in enumerate(
            digests(agent, request.tools, request.messages), 1
        ):
            if message.role == "assistant" and digest in self._ended:
                found, count = self._ended[digest], number
        return found, count

    def _remember(self, agent: Agent, call: Asked, done: asyncio.Task[tuple[Turn, ...]]) -> None:
        if call.failed:
            return
        for turn in done.result():
            said = shown(turn, call.request)
            *_, (_, digest) = digests(agent, call.request.tools, (*call.request.messages, said))
            self._ended.setdefault(digest, turn)

    def remember_response(self, name: str, messages: tuple[Message, ...]) -> None:
        """The chat that `previous_response_id` NAME stands for."""
        self._remembered[name] = messages

    def response_chat(self, name: str) -> tuple[Message, ...]:
        if name not in self._remembered:
            told = f"previous_response_id {name[:60]!r}: no such response in this episode"
            raise BadRequest(404, told, param="previous_response_id")
        return self._remembered[name]

    # rewards

    def reward(self, data: Any, source: str) -> None:
        """Put rewards on record (see `rewards.returned` and `rewards.posted`): a number, an object,
        or a list of objects."""
        self.team.rewards.extend(read_rewards(data, source, self.team))  # all of them or none
        if source == "posted":
            self.posted.set()


def digests(
    agent: Agent, tools: Sequence[Any], messages: Sequence[Message]
) -> list[tuple[Message, str]]:
    """For each message, a hash of the chat up to it. Names of calls do not count, nor how a program
    spells their arguments."""
    seen = hashlib.sha256(json.dumps([agent.name, tools], sort_keys=True).encode())
    found = []
    for message in messages:
        calls = [(call["name"], _same_json(call["arguments"])) for call in message.tool_calls]
        seen.update(json.dumps([message.role, message.content, message.name, calls]).encode())
        found.append((message, seen.copy().hexdigest()))
    return found


def _same_json(text: str) -> str:
    found = loaded(text)
    return found if isinstance(found, str) else json.dumps(found, sort_keys=True)


def opening(
    team: Team, agent: Agent, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
) -> tuple[Message, ...]:
    """A new chat as the engine gets it: the agent's own prompt, if it has one, in place of the
    program's system message; then tools."""
    own = team.opening(agent.spec, {})
    given, rest = (
        (messages[0].content, messages[1:]) if messages[0].role == "system" else ("", messages)
    )
    prompt, demos = (own[0].content, own[1:]) if own and own[0].role == "system" else (given, own)
    text = "\n\n".join(part for part in (prompt, schemas_prompt(tools)) if part)
    return (Message("system", text), *demos, *rest) if text else (*demos, *rest)


def spoken_message(message: Message) -> Message:
    """A program's message as the engine gets it. Tool calls that the program wrote stand in the
    text, as a model would write them."""
    if not message.tool_calls:
        return message
    calls = []
    for call in message.tool_calls:
        named = {"name": call["name"], "arguments": loaded(call["arguments"])}
        written = json.dumps(named, ensure_ascii=False)
        calls.append(f"<tool_call>\n{written}\n</tool_call>")
    return Message(
        message.role,
        "\n".join([message.content, *calls] if message.content else calls),
        message.name,
    )


def read_turns(
    turns: Sequence[Turn], messages: Sequence[Message], previous: Turn | None
) -> tuple[int, ...]:
    """The turns whose text stands in these messages, as far as texts tell: all of it, and not as a
    part of a longer word or number.

    A short text can stand there by chance; `reads` of a program are for people and reports.
    """
    told = "\n".join(message.content for message in messages if message.role != "assistant")
    found = set(previous.reads) if previous else set()
    return tuple(
        sorted(found | {turn.index for turn in turns if turn.taken and stands_in(turn.text, told)})
    )
