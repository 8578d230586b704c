"""A gateway session: one external program's OpenAI-API calls during one episode, recorded as turns,
with its base URL, its API key and its posted rewards.

Turns are numbered in the order in which calls arrive.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ...agents.chat import Agent
from ...agents.team import Team
from ...agents.transcript import LimitError
from ...agents.types import Message, Sampling, SettingError, Turn, nearest
from ..engines.base import PromptTooLong
from .api.chat import Request
from .api.fields import BadRequest, wrong
from .chat_matching import ChatMatcher, KnownChat, engine_message, opening, read_turns
from .retries import Connection, PendingCall, RetryCache
from .rewards import read_rewards

T = TypeVar("T")


class Session:
    """A program in an episode.

    Args:
        team: answers the calls; its turns are what is recorded.
        models: further names by which the program may call agents.
        keep_sampling: temperature and the like are the program's where it names them; else they are
            the run's alone.
        unforced_tools: where the program wants to force a tool call, the agent may call it or not;
            else such a request is refused.

    Attributes:
        base_url: the address of this episode; set by the server.
        calls: all calls so far, for requests that are sent again.
        chats: which chat a request continues.
        posted: set once a reward was posted from outside the program.
    """

    def __init__(
        self,
        team: Team,
        models: Mapping[str, str] | None = None,
        *,
        keep_sampling: bool = False,
        unforced_tools: bool = False,
    ) -> None:
        self.team, self.models = team, dict(models or {})
        self.keep_sampling, self.unforced_tools = keep_sampling, unforced_tools
        self.id, self.key = secrets.token_hex(12), secrets.token_urlsafe(24)
        self.base_url = ""
        self.closed = False
        self.calls, self.chats = RetryCache(), ChatMatcher()
        self.posted = asyncio.Event()
        self.too_long: PromptTooLong | None = None
        self._fatal: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._continued: set[int] = set()  # indices of turns whose chat went on

    def agent(self, model: str) -> Agent:
        """The agent of a request's `model`. Raises `BadRequest` with the names there are."""
        known = {agent.name: agent.name for agent in self.team} | self.models
        name = model.removeprefix("agent:")
        if name not in known:
            problem = f"no such agent; {nearest(name[:80], list(known))} (all: {', '.join(known)})"
            raise BadRequest(404, f"model {model[:80]!r}: {problem}", "model_not_found", "model")
        return self.team[known[name]]

    def names(self) -> list[str]:
        """The names by which agents can be called."""
        return [*(agent.name for agent in self.team), *self.models]

    def ask(
        self,
        body: str,
        request: Request,
        connection: Connection,
        *,
        key: str = "",
        retries: int | None = None,
    ) -> PendingCall:
        """The call of a request: a new one, whose turn's index is assigned now, or an earlier one
        that is sent again (see `RetryCache.find`). `body`: its `request_hash`."""
        call = self.calls.find(body, key, retries)
        if call is None:
            agent = self.agent(request.model)
            chat = self.chats.find(agent.name, request)
            try:
                numbered = self._call(agent, request, chat)
            except LimitError as error:
                self.fail(error)
                raise BadRequest(429, str(error), "episode_over") from error
            answer = asyncio.ensure_future(self._answer(numbered))
            call = PendingCall(body, key, request, answer)
            answer.add_done_callback(lambda done: self._remember(chat, call, done))
            self.calls.add(call)
        call.connections.append(connection)
        return call

    def _call(self, agent: Agent, request: Request, chat: KnownChat) -> Awaitable[Turn]:
        """Number the call; awaiting it gives the taken turn."""
        if request.forced and not self.unforced_tools:
            problem = "a call cannot be forced here; system.unforced_tools takes it for auto"
            raise wrong("tool_choice", problem)
        previous = chat.turn
        new = tuple(engine_message(message) for message in request.messages[chat.count :])
        if previous is None:
            messages = opening(self.team, agent, new, request.tools)
        else:
            messages = (*previous.messages, Message("assistant", previous.text), *new)
        if messages and messages[-1].role == "assistant":
            raise wrong(
                request.messages_field, "the last one is the assistant's; expected one to answer"
            )
        sampling = self._sampling(agent, request)
        # Nothing is refused from here on: what follows is recorded.
        if previous is not None and previous.index not in self._continued:
            self.team.select(previous)  # the first of its siblings whose chat goes on
            self._continued.add(previous.index)
        reads = read_turns(self.team.turns, new, previous)
        return agent.answer(messages, previous, reads=reads, n=request.n, sampling=sampling)

    def _sampling(self, agent: Agent, request: Request) -> Sampling:
        base = agent.spec.sampling or self.team.services.sampling
        fields: dict[str, Any] = {
            "stop": (*base.stop, *request.stop),
            "grammar": request.grammar,
            "logit_bias": request.logit_bias,
        }
        if request.max_tokens is not None:
            fields["max_tokens"] = min(base.max_tokens, request.max_tokens)
        if self.keep_sampling:
            if request.sampling.get("top_p") == 0:  # harmless where it has no effect
                raise wrong("top_p", "expected a number above 0, got 0")
            fields |= request.sampling
            fields["top_k"] = max(0, int(fields.get("top_k", base.top_k)))  # vLLM's -1 is "off"
        changed = {name: value for name, value in fields.items() if value != getattr(base, name)}
        return replace(base, **changed) if changed else base

    async def _answer(self, call: Awaitable[Turn]) -> tuple[Turn, ...]:
        """All siblings of a call. Errors of the run or the episode end the episode; the others are
        an error reply to the program."""
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
        """End the episode with this error, whether or not the program handles it."""
        if not self._fatal.done():
            self._fatal.set_result(error)

    async def guard(self, work: Awaitable[T]) -> T:
        """The program's result; if the episode fails meanwhile, the program is cancelled and that
        error raised.

        An error of a program after one of its prompts did not fit is reported as that.
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
        """Cancel open calls; turns whose reply was not delivered are recorded as not taken."""
        self.closed = True
        await asyncio.sleep(0)  # a call that arrived just now starts, so that it can be cancelled
        for call in self.calls:
            call.answer.cancel()
        await asyncio.gather(*(call.answer for call in self.calls), return_exceptions=True)
        for call in self.calls:
            if not call.delivered and not call.failed:
                for turn in call.answer.result():
                    self.team.select(turn, taken=False)

    def _remember(
        self, chat: KnownChat, call: PendingCall, done: asyncio.Task[tuple[Turn, ...]]
    ) -> None:
        if not call.failed:
            self.chats.remember(chat, call.request, done.result())

    def reward(self, data: Any, source: str) -> None:
        """Record rewards of `source` "returned" or "posted": a number, an object, or a list of
        objects."""
        self.team.rewards.extend(read_rewards(data, source, self.team))  # all of them or none
        if source == "posted":
            self.posted.set()
