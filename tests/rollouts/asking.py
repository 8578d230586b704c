"""A program in a test: a coroutine that asks the gateway with a plain HTTP client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from marlora.agents.types import Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.gateway.programs import ExternalProgram
from marlora.rollouts.gateway.session import Session
from marlora.rollouts.types import Episode

TASK = Task("t1", "7+8+5", "gold-20", "sums", "train", {"c": 5, "_hidden": "h"})


@dataclass
class Asker:
    """A client of one episode: `await ask(...)` posts a chat completion and returns (status,
    body)."""

    visit: Session
    session: aiohttp.ClientSession

    async def post(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        head = {
            "Authorization": f"Bearer {self.visit.key if key is None else key}",
            **(headers or {}),
        }
        data = body if isinstance(body, (str, bytes)) else json.dumps(body)
        url = path if path.startswith("http") else f"{self.visit.base_url}{path}"
        async with self.session.post(
            url, data=data, headers={"Content-Type": "application/json", **head}
        ) as reply:
            text = await reply.text()
            return reply.status, (
                json.loads(text) if reply.content_type == "application/json" else text
            )

    async def get(self, path: str) -> tuple[int, Any]:
        head = {"Authorization": f"Bearer {self.visit.key}"}
        async with self.session.get(f"{self.visit.base_url}{path}", headers=head) as reply:
            return reply.status, await reply.json()

    async def ask(
        self, model: str, *messages: Any, headers: Mapping[str, str] | None = None, **settings: Any
    ) -> Any:
        """The body of a chat completion; a text is a message of the user's. Asserts that it went
        well."""
        status, body = await self.post(
            "/chat/completions", chat(model, *messages, **settings), headers
        )
        assert status == 200, body
        return body

    async def say(self, model: str, *messages: Any, **settings: Any) -> str:
        return (await self.ask(model, *messages, **settings))["choices"][0]["message"]["content"]


def chat(model: str, *messages: Any, **settings: Any) -> dict[str, Any]:
    told = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return {"model": model, "messages": told, **settings}


Body = Callable[[Asker], Awaitable[Any]]


@dataclass
class Ask(ExternalProgram):
    """A program that is a coroutine of the test."""

    body: Body | None = None

    async def play(self, task: Task, visit: Session) -> Any:
        assert self.body is not None
        async with aiohttp.ClientSession() as session:
            return await self.body(Asker(visit, session))


def rollouts(
    engine: Any, system: ExternalProgram, rewards: Any = (), **settings: Any
) -> EpisodeRunner:
    found = {
        spec.policy: EngineCompleter(engine, engine.tokens, spec.policy) for spec in system.specs
    }
    return EpisodeRunner(system, found, rewards, **settings)


def play(
    body: Body,
    engine: Any = None,
    rewards: Any = (),
    agents: Any = ("a", "b"),
    program: Any = None,
    **settings: Any,
) -> Episode:
    """The episode of a program; the engine answers `15` unless one is given."""
    engine = engine or ScriptedEngine(lambda *asked: "15")
    system = Ask(list(agents), body=body, **(program or {}))
    return asyncio.run(
        rollouts(engine, system, rewards, **settings).play(EpisodeRequest(TASK, "g"))
    )


def played(body: Body, *args: Any, **settings: Any) -> Episode:
    """The same for an episode that has to end well."""
    episode = play(body, *args, **settings)
    assert episode.error is None, episode.error
    return episode


def numbered() -> ScriptedEngine:
    """Each engine call gives another number, each sibling too."""
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: f"{len(engine.calls)}.{k}")
    return engine
