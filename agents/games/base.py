"""Games of two players with private goals: they move in turn, a referee refuses illegal moves, and
each player has a payoff.

The competitive setting of SiriuS (Zhao et al., arXiv 2502.04780), whose games are those of Bianchi
et al. (arXiv 2402.05863). What differs from there: a move is one line of text that a parser reads,
not tagged sections of a page; all numbers are whole; an illegal move is refused in words and asked
for again, and too many of them end the game without a deal; an offer that asks for no more
than the offer on the table gives is taken as its acceptance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..chat import Agent
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.templates import fields_in, render
from ..types import SettingError, Task, Turn, nearest

_LINE = r"^[^\w\n]*{}\b[^\w\n]*:[^\S\n]*(\S[^\n]*)$"
_MOVE = re.compile(_LINE.format("move"), re.IGNORECASE | re.MULTILINE)
_MESSAGE = re.compile(_LINE.format("message"), re.IGNORECASE | re.MULTILINE)
_OFFER = re.compile(r"(?:offer|propose)?\s*(.*)", re.IGNORECASE | re.DOTALL)

HOW = (
    "End your reply with a line that holds your move: `Move: offer {terms}`, `Move: accept` (the"
    " offer on the table) or `Move: reject` (the game ends without a deal). What a line `Message:"
    " ...` says, the other player reads; the rest of your reply nobody does. An offer that asks for"
    " no more than the one on the table gives you accepts it. Without a deal after {moves} moves in"
    " all, the game ends."
)


class Illegal(ValueError):
    """A move that the rules forbid. The message, for the player, says why."""


@dataclass(frozen=True)
class Offer:
    """What a player proposes. `seat`: 0 for the first player, 1 for the second. `terms`: the game's
    own whole numbers."""

    seat: int
    terms: tuple[int, ...]


Move = Offer | Literal["accept", "reject"]


@dataclass
class Game(System):
    """Two agents in the order in which they move. What a game adds: `own`, `brief`, `terms`,
    `spell`, `suits` and `payoffs`.

    Args:
        max_moves: moves of both together.
        refusals: how often a player may move again after an illegal move before the game ends
            without a deal.
        views: by agent name, a template of the whole prompt before a move, in place of ours.
            Fields: `prompt` (the task), `offer` (the one on the table, `-` if none),
            `message` (what came with it), `left` (moves left), and those of `own`.

    The output is JSON: `players`, `moves` (player, move), `deal` (the offer that was accepted, or
    null), `ended` (deal, reject, illegal or moves), `refused` (illegal replies by player) and
    `payoffs` (by player). A task's public `meta` holds the facts of the game; a player's prompt
    holds those that both know and its own, never the other's.
    """

    max_moves: int = setting("moves of both together", 8, at_least=1)
    refusals: int = setting("illegal moves that a player may correct in one move", 1, at_least=0)
    views: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        name, names = type(self).__name__, [spec.name for spec in self.specs]
        if len(names) != 2:
            raise SettingError(
                f"{name}: two agents expected, in the order in which they move, got {len(names)}"
            )
        for key, template in self.views.items():
            if key not in names:
                raise SettingError(f"views.{key}: no such player; {nearest(key, names)}")
            fields_in(template, setting=f"views.{key}")

    # What a game adds.

    def own(self, task: Task, seat: int) -> Mapping[str, Any]:
        """What this player knows, by name: the public facts of the game and its own private
        ones."""
        raise TypeError(f"{type(self).__name__} has no own(task, seat)")

    def brief(self, task: Task, seat: int) -> str:
        """The player's role and goal in words."""
        raise TypeError(f"{type(self).__name__} has no brief(task, seat)")

    @property
    def form(self) -> str:
        """How the terms of an offer are written, for the player."""
        return "N"

    def terms(self, text: str, task: Task, seat: int) -> tuple[int, ...]:
        """The terms that a player wrote. Raises `Illegal`, in words for the player, if they are
        none or the rules forbid them."""
        raise TypeError(f"{type(self).__name__} has no terms(text, task, seat)")

    def spell(self, offer: Offer, task: Task) -> str:
        """The terms as they are written; what `terms` reads back."""
        return " ".join(map(str, offer.terms))

    def suits(self, offer: Offer, standing: Offer, task: Task) -> bool:
        """Whether `offer` asks for no more than `standing`, the other player's, gives."""
        raise TypeError(f"{type(self).__name__} has no suits(offer, standing, task)")

    def payoffs(self, task: Task, deal: Offer | None) -> tuple[float, float]:
        """The payoffs of both players; None is no deal."""
        raise TypeError(f"{type(self).__name__} has no payoffs(task, deal)")

    # The referee.

    async def run(self, task: Task, team: Team) -> str:
        players = list(team)
        record: dict[str, Any] = {
            "players": [p.name for p in players],
            "moves": [],
            "refused": {p.name: 0 for p in players},
        }
        standing: Offer | None = None
        deal: Offer | None = None
        last: Turn | None = None
        ended = "moves"
        for number in range(self.max_moves):
            seat = number % 2
            move, last = await self._move(players[seat], seat, number, standing, last, task, record)
            if move is None:
                ended = "illegal"
                break
            spelt = f"offer {self.spell(move, task)}" if isinstance(move, Offer) else move
            record["moves"].append([players[seat].name, spelt])
            if isinstance(move, Offer) and not (
                standing is not None and self.suits(move, standing, task)
            ):
                standing = move
                continue
            ended, deal = ("reject", None) if move == "reject" else ("deal", standing)
            break
        record |= {
            "ended": ended,
            "deal": None if deal is None else [players[deal.seat].name, *deal.terms],
        }
        record["payoffs"] = dict(zip(record["players"], self.payoffs(task, deal), strict=True))
        return json.dumps(record)

    async def _move(
        self,
        player: Agent,
        seat: int,
        number: int,
        standing: Offer | None,
        last: Turn | None,
        task: Task,
        record: dict[str, Any],
    ) -> tuple[Move | None, Turn]:
        """The player's next legal move, None if it makes none, and the turn that holds it."""
        text = self.prompt_for(player.name, seat, number, standing, last, task)
        reads = [last] if last is not None else []
        for _ in range(self.refusals + 1):
            turn = await player.reply(text, reads=reads)
            try:
                return self.read(turn.text, seat, standing, task), turn
            except Illegal as error:
                record["refused"][player.name] += 1
                text, reads = f"The referee refuses this: {error}. Move again.", []
        return None, turn

    def prompt_for(
        self,
        name: str,
        seat: int,
        number: int,
        standing: Offer | None,
        last: Turn | None,
        task: Task,
    ) -> str:
        """The player's prompt before move `number`, counted from 0. Of `last`, the other's turn, it
        quotes the move and the message."""
        offer = "-" if standing is None else self.spell(standing, task)
        message = message_of(last.text) if last is not None else ""
        if name in self.views:
            fields = {
                "prompt": task.prompt,
                "offer": offer,
                "message": message,
                "left": self.max_moves - number,
            }
            fields |= self.own(task, seat)
            context = f" for task {task.id!r}"
            return render(self.views[name], fields, setting=f"views.{name}", context=context)
        how = render(HOW, {"terms": self.form, "moves": self.max_moves}, setting="how")
        opening = [task.prompt, self.brief(task, seat), how] if number < 2 else []
        words = [f"The other player says: {message}"] if message else []
        table = [f"The other player's offer: {offer}"] if standing is not None else []
        left = self.max_moves - number
        return "\n\n".join(
            [
                *opening,
                *words,
                *table,
                f"Your move; {left} {'move is' if left == 1 else 'moves are'} left.",
            ]
        )

    def read(self, text: str, seat: int, standing: Offer | None, task: Task) -> Move:
        """The move in a reply: on its last line `Move: ...`, or all of it if it is one line. Raises
        `Illegal`."""
        moves = _MOVE.findall(text)
        lines = [line for line in text.splitlines() if line.strip()]
        if not moves and len(lines) != 1:
            raise Illegal("it has no line `Move: ...`")
        spelt = (moves[-1] if moves else lines[0]).strip(" \t`*\"'.!")
        word = spelt.casefold()
        if word == "accept" and standing is None:
            raise Illegal("there is no offer on the table to accept")
        if word == "accept":
            return "accept"
        if word == "reject":
            return "reject"
        match = _OFFER.fullmatch(spelt)
        return Offer(seat, self.terms(match[1] if match else "", task, seat))


def message_of(text: str) -> str:
    """The message to the other player in a reply; "" if there is none."""
    messages = _MESSAGE.findall(text)
    return messages[-1].strip() if messages else ""


def number(text: str, most: int) -> int:
    """A whole number from 0 to `most`, perhaps after a sign of money. Raises `Illegal`."""
    match = re.fullmatch(r"[$€£]?\s*([0-9]{1,9})", text.strip())
    if match is None or int(match[1]) > most:
        raise Illegal(f"expected a whole number from 0 to {most}")
    return int(match[1])


def fact(task: Task, *path: str | int, of: str) -> Any:
    """An entry of the task's public meta. Raises `SettingError` if the task is not one of this
    game."""
    value: Any = task.meta
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise SettingError(
                f"task {task.id!r}: its meta has no {'.'.join(map(str, path))}, which {of} is"
                " played with; take tasks from marlora.rollouts.tasks.games"
            ) from None
    return value
