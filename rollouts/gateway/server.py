"""The gateway: an OpenAI-compatible server with an address per episode, answered by the team. It
speaks Anthropic's Messages API too.

    async with GatewayServer().open_session(team) as session:
        ...  # a program asks session.base_url with session.key; model="solver" is that agent

The server runs while any session is open. It listens on loopback, at a free port. Every episode has
an address and a key of its own, so requests need no tag and no episode can write into another. It
serves `/chat/completions` (streamed or not, `n`, tools, stop, log-probs, structured output),
`/responses` and Anthropic's `/messages` as far as they are chats, `/completions`, and `/models`;
and `/rewards` for holders of the reward token, which programs do not get.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from ...agents.team import Team
from ...agents.types import SettingError, Turn
from .api import messages
from .api.chat import Request, chat_chunks, chat_completion, read_chat, shown
from .api.completions import completion, completion_chunks, read_completion
from .api.fields import BadRequest, parse_body
from .api.responses import read_response, response, response_events
from .retries import PendingCall, disconnected, request_hash
from .session import Session

# environment variable of the run and of the process that posts rewards; never given to a program
REWARD_TOKEN = "MARLORA_REWARD_TOKEN"
RETRIES = re.compile("[0-9]{1,9}")


class GatewayServer:
    """The server for programs; one listener per event loop.

    Args:
        host: the address to listen on and to be reached by; anything but loopback lets other
            machines connect.
        max_body: bytes of a request.
        body_timeout: seconds in which a request has to be sent whole.
        call_timeout: seconds until a call without an answer gets an error (the episode goes on).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        max_body: int = 8 << 20,
        body_timeout: float = 30.0,
        call_timeout: float = 600.0,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise SettingError(
                f"host {host!r}: name the address that programs reach this machine by, such as"
                " 127.0.0.1"
            )
        self.host, self.max_body = host, max_body
        self.body_timeout, self.call_timeout = body_timeout, call_timeout
        self._open: dict[asyncio.AbstractEventLoop, Listener] = {}

    @contextlib.asynccontextmanager
    async def open_session(
        self,
        team: Team,
        models: Mapping[str, str] | None = None,
        *,
        keep_sampling: bool = False,
        unforced_tools: bool = False,
    ) -> AsyncIterator[Session]:
        """One `Session` for a program, open as long as the context lasts. See `Session` for the
        arguments."""
        loop = asyncio.get_running_loop()
        session = Session(team, models, keep_sampling=keep_sampling, unforced_tools=unforced_tools)
        listener = self._open.get(loop) or Listener(self)
        self._open[loop] = listener
        listener.open_sessions += 1
        try:
            await asyncio.shield(listener.started)
            listener.sessions[session.id] = session
            session.base_url = f"{listener.url}/episodes/{session.id}/v1"
            yield session
        finally:
            listener.sessions.pop(session.id, None)
            await session.close()
            listener.open_sessions -= 1
            if not listener.open_sessions:
                del self._open[loop]
                await listener.close()


class Listener:
    """The gateway's HTTP server in one event loop."""

    def __init__(self, gateway: GatewayServer) -> None:
        self.gateway = gateway
        self.sessions: dict[str, Session] = {}
        self.open_sessions = 0  # those about to open included
        self.url = ""
        self._hosts: frozenset[str] = frozenset()
        token = os.environ.get(REWARD_TOKEN, "")
        if token and len(token) < 16:
            raise SettingError(
                f"environment variable {REWARD_TOKEN}: at least 16 characters expected, got"
                f" {len(token)}"
            )
        self._reward_token = token
        app = web.Application(client_max_size=gateway.max_body, middlewares=[self._errors])
        app.add_routes(
            [
                # tried in this order
                web.post("/episodes/{episode}/v1/chat/completions", self._chat),
                web.post("/episodes/{episode}/v1/responses", self._responses),
                web.post("/episodes/{episode}/v1/messages", self._messages),
                web.post("/episodes/{episode}/v1/completions", self._completions),
                web.get("/episodes/{episode}/v1/models", self._models),
                web.get("/episodes/{episode}/v1/models/{model}", self._models),
                web.post("/episodes/{episode}/rewards", self._rewards),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, auto_decompress=False
        )
        self.started = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            await self._runner.setup()
            # many programs connect at once
            await web.TCPSite(self._runner, self.gateway.host, 0, backlog=4096).start()
        except OSError as error:
            raise SettingError(
                f"host {self.gateway.host!r}: cannot listen there ({error.strerror or error})"
            ) from error
        port = self._runner.addresses[0][1]
        host = f"[{self.gateway.host}]" if ":" in self.gateway.host else self.gateway.host
        self.url = f"http://{host}:{port}"
        self._hosts = frozenset(
            f"{name}:{port}" for name in (host, "localhost", "127.0.0.1", "[::1]")
        )

    async def close(self) -> None:
        await asyncio.gather(self.started, return_exceptions=True)
        await self._runner.cleanup()

    # checks of every request

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check Host and Origin; answer errors as OpenAI does, or Anthropic where the path is its
        own."""
        try:
            if request.headers.get("Host") not in self._hosts:  # DNS rebinding
                raise BadRequest(403, "Host: not an address of this server", "forbidden")
            if "Origin" in request.headers:  # a page in a browser
                raise BadRequest(403, "Origin: browsers are not served", "forbidden")
            return await handler(request)
        except BadRequest as error:
            return _refusal(request, error)
        except web.HTTPException as error:
            return _refusal(request, BadRequest(error.status, error.reason), _allow(error))

    def _session(self, request: web.Request) -> Session:
        """The `Session` at the address, if the request has its key. Without the key, an episode
        that exists and one that does not get the same error."""
        session = self.sessions.get(request.match_info["episode"])
        if session is None or session.closed or not _has_key(request, session.key):
            raise BadRequest(
                401, "no such episode, it is over, or this is not its key", "invalid_api_key"
            )
        return session

    async def _raw(self, request: web.Request) -> bytes:
        """The body, as it was sent."""
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadRequest(
                400, "Content-Encoding: expected none, bodies are read as they are sent"
            )
        if request.content.is_eof():  # it came with the head, as short ones do
            return await request.read()
        try:
            async with asyncio.timeout(self.gateway.body_timeout):
                return await request.read()
        except TimeoutError as error:
            raise BadRequest(
                408, f"the request was not sent whole in {self.gateway.body_timeout:g} s", "timeout"
            ) from error

    # the endpoints

    async def _models(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        models = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": session.agent(name).spec.policy,
            }
            for name in session.names()
        ]
        if "model" not in request.match_info:
            return web.json_response({"object": "list", "data": models})
        agent = session.agent(request.match_info["model"])
        return web.json_response(next(each for each in models if each["id"] == agent.name))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        raw = await self._raw(request)
        call = self._ask(session, request, raw, read_chat(parse_body(raw)))
        turns = await self._answer(call)
        head = {"id": f"chatcmpl-{session.id}-{turns[0].index}", "created": call.created}
        if call.request.stream:
            return await self._send_events(request, call, chat_chunks(head, call.request, turns))
        return await self._send_json(request, call, chat_completion(head, call.request, turns))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        raw = await self._raw(request)
        call = self._ask(session, request, raw, read_completion(parse_body(raw)))
        turns = await self._answer(call)
        head = {"id": f"cmpl-{session.id}-{turns[0].index}", "created": call.created}
        if call.request.stream:
            return await self._send_events(
                request, call, completion_chunks(head, call.request, turns)
            )
        return await self._send_json(request, call, completion(head, call.request, turns))

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        raw = await self._raw(request)
        call = self._ask(session, request, raw, messages.read_request(parse_body(raw)))
        turns = await self._answer(call)
        reply = messages.reply_body(f"msg_{session.id}_{turns[0].index}", call.request, turns)
        if call.request.stream:
            return await self._send_events(request, call, messages.reply_events(reply))
        return await self._send_json(request, call, reply)

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        raw = await self._raw(request)
        call = self._ask(
            session, request, raw, read_response(parse_body(raw), session.chats.response_chat)
        )
        turns = await self._answer(call)
        reply = response(f"resp_{session.id}_{turns[0].index}", call.created, call.request, turns)
        chat = (*call.request.messages, shown(turns[0], call.request))
        session.chats.remember_response(reply["id"], chat)
        if call.request.stream:
            return await self._send_events(request, call, response_events(reply))
        return await self._send_json(request, call, reply)

    def _ask(
        self, session: Session, request: web.Request, raw: bytes, chat: Request
    ) -> PendingCall:
        if session.closed:  # while the body came in
            raise BadRequest(401, "the episode is over", "invalid_api_key")
        count = request.headers.get("x-stainless-retry-count", "")
        retries = int(count) if RETRIES.fullmatch(count) else None
        key = request.headers.get("Idempotency-Key", "")
        body = request_hash(request.path, raw)
        return session.ask(body, chat, request, key=key, retries=retries)

    async def _answer(self, call: PendingCall) -> tuple[Turn, ...]:
        """The answer, which goes on if this request is given up."""
        await asyncio.wait([call.answer], timeout=self.gateway.call_timeout)
        if not call.answer.done():
            raise BadRequest(504, f"no answer in {self.gateway.call_timeout:g} s", "timeout")
        if call.answer.cancelled():
            raise BadRequest(401, "the episode is over", "invalid_api_key")
        return call.answer.result()

    async def _send_json(
        self, request: web.Request, call: PendingCall, reply: Mapping[str, Any]
    ) -> web.StreamResponse:
        return await self._deliver(request, call, "application/json", json.dumps(reply))

    async def _send_events(
        self, request: web.Request, call: PendingCall, events: Sequence[str]
    ) -> web.StreamResponse:
        return await self._deliver(request, call, "text/event-stream", "".join(events))

    async def _deliver(
        self, request: web.Request, call: PendingCall, kind: str, text: str
    ) -> web.StreamResponse:
        """Send the reply and mark the call delivered; without a connection the reply stays for the
        call's next retry."""
        reply = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-store"})
        if disconnected(request):
            return reply
        body = text.encode()
        if kind == "application/json":
            reply.content_length = len(body)
        with contextlib.suppress(ConnectionError):
            await reply.prepare(request)
            await reply.write_eof(body)  # head and body in one packet wake the program once
            call.deliver()
        return reply

    async def _rewards(self, request: web.Request) -> web.StreamResponse:
        """Rewards posted from outside the program, with the reward token."""
        if not self._reward_token:
            raise BadRequest(
                403,
                f"no rewards are taken here: set {REWARD_TOKEN} for the run and for the process"
                " that posts them",
                "forbidden",
            )
        session = self.sessions.get(request.match_info["episode"])
        if session is None or session.closed or not _has_key(request, self._reward_token):
            raise BadRequest(
                401,
                "no such episode, it is over, or this is not the reward token",
                "invalid_api_key",
            )
        session.reward(parse_body(await self._raw(request)), "posted")
        return web.json_response({"rewards": len(session.team.rewards)})


def _refusal(
    request: web.Request, error: BadRequest, headers: Mapping[str, str] | None = None
) -> web.Response:
    """The error reply, in the words of the API that was asked."""
    own = request.path.endswith("/v1/messages")
    body = messages.error_body(error) if own else error.body()
    return web.json_response(body, status=error.status, headers=headers)


def _has_key(request: web.Request, key: str) -> bool:
    """The key stands in one header: as OpenAI's clients send it, or as Anthropic's do."""
    given = [
        *request.headers.getall("Authorization", []),
        *(f"Bearer {each}" for each in request.headers.getall("x-api-key", [])),
    ]
    if len(given) != 1:
        return False
    raw = given[0].encode("utf-8", "surrogateescape")  # headers may hold any bytes
    return hmac.compare_digest(raw, f"Bearer {key}".encode())


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
