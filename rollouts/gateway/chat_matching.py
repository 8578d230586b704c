"""Which chat a request continues, and its messages as the engine gets them. Pure functions of the
turns so far; no network and no clock.

A program holds its chats itself and sends them whole. A request whose messages begin with those of
an earlier request and the answer that was returned for it continues that chat, token for token; any
other request starts a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.chat import Agent
from ...agents.team import Team
from ...agents.text.answers import stands_in
from ...agents.tools.tools import schemas_prompt
from ...agents.types import Message, Turn
from .api.chat import Request, shown
from .api.fields import BadRequest, loaded


@dataclass(frozen=True)
class KnownChat:
    """What is known of a request's chat: the turn that ends its longest known beginning, and how
    many messages that beginning has; None and 0 for a new chat. `whole`: the hash of all of its
    messages."""

    turn: Turn | None
    count: int
    whole: hashlib._Hash


class ChatMatcher:
    """The chats of one episode, by a hash of agent, tools and messages, and by the ids of
    responses."""

    def __init__(self) -> None:
        self._last_turns: dict[bytes, Turn] = {}  # hash of a chat that ends with an answer -> turn
        self._responses: dict[str, tuple[Message, ...]] = {}  # response id -> its chat

    def find(self, agent: str, request: Request) -> KnownChat:
        """The chat that a request continues."""
        turn, count = None, 0
        whole = hashlib.sha256(json.dumps([agent, request.tools], sort_keys=True).encode())
        for number, message in enumerate(request.messages, 1):
            whole.update(_for_hash(message))
            if message.role == "assistant":
                known = self._last_turns.get(whole.digest())
                turn, count = (known, number) if known else (turn, count)
        return KnownChat(turn, count, whole)

    def remember(self, chat: KnownChat, request: Request, turns: Sequence[Turn]) -> None:
        """The chats that these answers to a request end; `chat` is what `find` gave for it."""
        for turn in turns:
            answered = chat.whole.copy()
            answered.update(_for_hash(shown(turn, request)))
            self._last_turns.setdefault(answered.digest(), turn)

    def remember_response(self, name: str, messages: tuple[Message, ...]) -> None:
        """Keep the chat of a response for a later `previous_response_id`."""
        self._responses[name] = messages

    def response_chat(self, name: str) -> tuple[Message, ...]:
        """The chat of a `previous_response_id`. Raises `BadRequest` for an unknown one."""
        if name not in self._responses:
            problem = f"previous_response_id {name[:60]!r}: no such response in this episode"
            raise BadRequest(404, problem, param="previous_response_id")
        return self._responses[name]

    def sizes(self) -> tuple[int, int]:
        """How many chats and how many responses are known."""
        return len(self._last_turns), len(self._responses)


def _for_hash(message: Message) -> bytes:
    """What a chat's hash takes of a message: the ids of tool calls do not count, nor how a program
    spells their arguments."""
    calls = [(call["name"], _same_json(call["arguments"])) for call in message.tool_calls]
    return json.dumps([message.role, message.content, message.name, calls]).encode()


def _same_json(text: str) -> str:
    value = loaded(text)
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def opening(
    team: Team, agent: Agent, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
) -> tuple[Message, ...]:
    """The first messages of a new chat as the engine gets them: the agent's own prompt, if it has
    one, in place of the program's system message; then the tools."""
    own = agent.opening({})
    given, rest = (
        (messages[0].content, messages[1:]) if messages[0].role == "system" else ("", messages)
    )
    prompt, demos = (own[0].content, own[1:]) if own and own[0].role == "system" else (given, own)
    text = "\n\n".join(part for part in (prompt, schemas_prompt(tools)) if part)
    return (Message("system", text), *demos, *rest) if text else (*demos, *rest)


def engine_message(message: Message) -> Message:
    """A program's message as the engine gets it: its tool calls are part of the text, as a model
    would write them."""
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
    """Indices of the turns whose text occurs in these messages: the whole text, and not as a part
    of a longer word or number.

    A short text can occur by chance; a program's `reads` are for people and reports.
    """
    text = "\n".join(message.content for message in messages if message.role != "assistant")
    indices = set(previous.reads) if previous else set()
    return tuple(
        sorted(
            indices | {turn.index for turn in turns if turn.taken and stands_in(turn.text, text)}
        )
    )
