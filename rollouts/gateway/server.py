"""The door: an OpenAI-compatible address for each episode, behind which the team answers.

    async with Door().admit(team) as visit:
        ...  # a program asks visit.base_url with visit.key: model="solver" is the agent of that
        name

The server is up while somebody is inside. It listens on loopback, at a free port. Every episode has
an address and a key of its own, so nothing has to be tagged and no episode can write into another.
It answers what a chat needs: `/chat/completions` (streamed or not, `n`, tools, stop, log-probs,
structured output), `/responses` as far as it is a chat, `/models`; and `/rewards` for whoever holds
the reward token, which programs do not see.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from ...agents.team import Team
from ...agents.types import SettingError
from .chat_api import Request, chat_chunks, chat_completion, read_chat, shown
from .fields import BadRequest, parse_body
from .responses_api import read_response, response, response_events
from .session import Asked, Session, disconnected

# environment variable of the run and of whoever posts rewards; never given to a program
REWARD_TOKEN = "MARLORA_REWARD_TOKEN"
RETRIES = re.compile("[0-9]{1,9}")


class GatewayServer:
    """Where programs ask.

    Args:
        host: the address to listen on and to be reached by; anything but loopback lets other
            machines knock.
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
        self.host, self.max_body, self.body_timeout, self.call_timeout = (
            host,
            max_body,
            body_timeout,
            call_timeout,
        )
        self._open: dict[asyncio.AbstractEventLoop, Listener] = {}

    @contextlib.asynccontextmanager
    async def admit(
        self,
        team: Team,
        models: Mapping[str, str] | None = None,
        *,
        keep_sampling: bool = False,
        unforced_tools: bool = False,
    ) -> AsyncIterator[Session]:
        """Let a program in for as long as the context lasts. See `Session` for the arguments."""
        loop = asyncio.get_running_loop()
        visit = Session(team, models, keep_sampling=keep_sampling, unforced_tools=unforced_tools)
        listener = self._open.get(loop) or Listener(self)
        self._open[loop] = listener
        listener.guests += 1
        try:
            await asyncio.shield(listener.started)
            listener.visits[visit.id] = visit
            visit.base_url = f"{listener.url}/episodes/{visit.id}/v1"
            yield visit
        finally:
            listener.visits.pop(visit.id, None)
            await visit.close()
            listener.guests -= 1
            if not listener.guests:
                del self._open[loop]
                await listener.close()


class Listener:
    """A door's server in one event loop."""

    def __init__(self, door: GatewayServer) -> None:
        self.door = door
        self.visits: dict[str, Session] = {}
        self.guests = 0  # who is inside or about to enter
        self.url = ""
        self._hosts: frozenset[str] = frozenset()
        token = os.environ.get(REWARD_TOKEN, "")
        if token and len(token) < 16:
            raise SettingError(
                f"environment variable {REWARD_TOKEN}: at least 16 characters expected, got"
                f" {len(token)}"
            )
        self._reward_token = token
        app = web.Application(client_max_size=door.max_body, middlewares=[self._errors])
        app.add_routes(
            [
                web.get("/episodes/{episode}/v1/models", self._models),
                web.get("/episodes/{episode}/v1/models/{model}", self._models),
                web.post("/episodes/{episode}/v1/chat/completions", self._chat),
                web.post("/episodes/{episode}/v1/responses", self._responses),
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
            site = web.TCPSite(
                self._runner, self.door.host, 0, backlog=4096
            )  # many programs knock at once
            await site.start()
        except OSError as error:
            raise SettingError(
                f"host {self.door.host!r}: cannot listen there ({error.strerror or error})"
            ) from error
        port = self._runner.addresses[0][1]
        host = f"[{self.door.host}]" if ":" in self.door.host else self.door.host
        self.url = f"http://{host}:{port}"
        self._hosts = frozenset(
            f"{name}:{port}" for name in (host, "localhost", "127.0.0.1", "[::1]")
        )

    async def close(self) -> None:
        await asyncio.gather(self.started, return_exceptions=True)
        await self._runner.cleanup()

    # who may ask

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check who asks; tell errors as OpenAI does."""
        try:
            if request.headers.get("Host") not in self._hosts:  # a name somebody made to point here
                raise BadRequest(403, "Host: not an address of this server", "forbidden")
            if "Origin" in request.headers:  # a page in a browser
                raise BadRequest(403, "Origin: browsers are not served", "forbidden")
            return await handler(request)
        except BadRequest as error:
            return web.json_response(error.body(), status=error.status)
        except web.HTTPException as error:
            told = BadRequest(error.status, error.reason)
            return web.json_response(told.body(), status=error.status, headers=_allow(error))

    def _visit(self, request: web.Request) -> Session:
        """The episode of the address, for who has its key. Without it, episodes there and not there
        are alike."""
        visit = self.visits.get(request.match_info["episode"])
        if visit is None or visit.closed or not _bears(request, visit.key):
            raise BadRequest(
                401, "no such episode, it is over, or this is not its key", "invalid_api_key"
            )
        return visit

    async def _body(self, request: web.Request) -> Any:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadRequest(
                400, "Content-Encoding: expected none, bodies are read as they are sent"
            )
        try:
            async with asyncio.timeout(self.door.body_timeout):
                raw = await request.read()
        except TimeoutError as error:
            raise BadRequest(
                408, f"the request was not sent whole in {self.door.body_timeout:g} s", "timeout"
            ) from error
        return parse_body(raw)

    # what they may ask

    async def _models(self, request: web.Request) -> web.StreamResponse:
        visit = self._visit(request)
        made = [
            {"id": name, "object": "model", "created": 0, "owned_by": visit.agent(name).spec.policy}
            for name in visit.names()
        ]
        if "model" not in request.match_info:
            return web.json_response({"object": "list", "data": made})
        agent = visit.agent(request.match_info["model"])
        return web.json_response(next(each for each in made if each["id"] == agent.name))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        visit = self._visit(request)
        body = await self._body(request)
        call = self._ask(visit, request, body, read_chat(body))
        turns = await self._answer(call, request)
        head = {"id": f"chatcmpl-{visit.id}-{turns[0].index}", "created": call.created}
        if call.request.stream:
            return await self._deliver(
                request, call, "text/event-stream", "".join(chat_chunks(head, call.request, turns))
            )
        return await self._deliver(
            request,
            call,
            "application/json",
            json.dumps(chat_completion(head, call.request, turns)),
        )

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        visit = self._visit(request)
        body = await self._body(request)
        call = self._ask(visit, request, body, read_response(body, visit.response_chat))
        turns = await self._answer(call, request)
        made = response(f"resp_{visit.id}_{turns[0].index}", call.created, call.request, turns)
        visit.remember_response(made["id"], (*call.request.messages, shown(turns[0], call.request)))
        if call.request.stream:
            return await self._deliver(
                request, call, "text/event-stream", "".join(response_events(made))
            )
        return await self._deliver(request, call, "application/json", json.dumps(made))

    def _ask(self, visit: Session, request: web.Request, body: Any, read: Request) -> Asked:
        if visit.closed:  # while the body came in
            raise BadRequest(401, "the episode is over", "invalid_api_key")
        said = request.headers.get("x-stainless-retry-count", "")
        retries = int(said) if RETRIES.fullmatch(said) else None
        key = request.headers.get("Idempotency-Key", "")
        return visit.ask([request.path, body], read, request, key=key, retries=retries)

    async def _answer(self, call: Asked, request: web.Request) -> Any:
        try:
            async with asyncio.timeout(self.door.call_timeout):
                return await asyncio.shield(call.answer)
        except TimeoutError as error:
            raise BadRequest(
                504, f"no answer in {self.door.call_timeout:g} s", "timeout"
            ) from error
        except asyncio.CancelledError:
            if call.answer.cancelled():
                raise BadRequest(401, "the episode is over", "invalid_api_key") from None
            raise

    async def _deliver(
        self, request: web.Request, call: Asked, kind: str, text: str
    ) -> web.StreamResponse:
        """Send the reply, and note that it was sent; a reply that nobody waits for is kept for the
        call's next try."""
        reply = web.StreamResponse(headers={"Content-Type": kind, "Cache-Control": "no-store"})
        if disconnected(request):
            return reply
        if kind == "application/json":
            reply.content_length = len(text.encode())
        with contextlib.suppress(ConnectionError):
            await reply.prepare(request)
            await reply.write(text.encode())
            await reply.write_eof()
            call.delivered = True
        return reply

    async def _rewards(self, request: web.Request) -> web.StreamResponse:
        """Rewards from outside the program, for the holder of the reward token."""
        if not self._reward_token:
            raise BadRequest(
                403,
                f"no rewards are taken here: set {REWARD_TOKEN} for the run and for who posts them",
                "forbidden",
            )
        visit = self.visits.get(request.match_info["episode"])
        if visit is None or visit.closed or not _bears(request, self._reward_token):
            raise BadRequest(
                401,
                "no such episode, it is over, or this is not the reward token",
                "invalid_api_key",
            )
        visit.reward(await self._body(request), "posted")
        return web.json_response({"rewards": len(visit.team.rewards)})


def _bears(request: web.Request, key: str) -> bool:
    given = request.headers.getall("Authorization", [])
    if len(given) != 1:
        return False
    raw = given[0].encode("utf-8", "surrogateescape")  # headers may hold any bytes
    return hmac.compare_digest(raw, f"Bearer {key}".encode())


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
