"""Resource exchange: each player holds two kinds of things, values them in its own way, and may
swap some of one for some of the other.

What both hold is public, what a unit is worth to a player only that player knows. Setting of the
paper: holdings (25, 5) and (5, 25), a unit of either kind worth the same to both, so that one's
gain is the other's loss; with worths that differ both can gain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..lookup import trusted
from ..types import Task
from .base import Game, Illegal, Offer, fact

_TERMS = re.compile(r"([0-9]{1,9})\s*(\w+)\s+for\s+([0-9]{1,9})\s*(\w+)", re.IGNORECASE)


@trusted("system")
@dataclass
class Exchange(Game):
    """Payoff: what a player's things are worth to it after the swap, less what they were worth
    before. See `Game`.

    `meta.kinds` names the two kinds, `meta.holdings` lists the amounts of both by seat, `meta.own`
    holds `{worth: [..., ...]}` of a unit of each by seat. Terms of an offer: amount given, its kind
    (0 or 1), amount asked for, its kind.
    """

    def own(self, task: Task, seat: int) -> Mapping[str, Any]:
        kinds, holdings = fact(task, "kinds", of="Exchange"), fact(task, "holdings", of="Exchange")
        worth = fact(task, "own", seat, "worth", of="Exchange")
        amounts = {"mine": holdings[seat], "theirs": holdings[1 - seat]}
        return {
            **{f"{whose}_{kinds[k]}": amounts[whose][k] for whose in amounts for k in (0, 1)},
            **{f"worth_{kinds[k]}": worth[k] for k in (0, 1)},
        }

    def brief(self, task: Task, seat: int) -> str:
        (x, y), mine = fact(task, "kinds", of="Exchange"), self.own(task, seat)
        return (
            f"You have {mine[f'mine_{x}']} {x} and {mine[f'mine_{y}']} {y}; the other player has"
            f" {mine[f'theirs_{x}']} {x} and {mine[f'theirs_{y}']} {y}. To you a {x} is worth"
            f" {mine[f'worth_{x}']} and a {y} {mine[f'worth_{y}']}; what they are worth to the"
            " other, you do not know. You want what you hold in the end to be worth as much as"
            f" possible. `offer 2 {x} for 3 {y}` gives the other 2 {x} and you 3 {y}."
        )

    @property
    def form(self) -> str:
        return "N THIS for M THAT"

    def terms(self, text: str, task: Task, seat: int) -> tuple[int, ...]:
        kinds, holdings = fact(task, "kinds", of="Exchange"), fact(task, "holdings", of="Exchange")
        match = _TERMS.fullmatch(text.strip())
        names = [kind.casefold() for kind in kinds]
        if match is None or {match[2].casefold(), match[4].casefold()} != set(names):
            raise Illegal(f"expected an offer such as `offer 2 {kinds[0]} for 3 {kinds[1]}`")
        given, asked, kind = int(match[1]), int(match[3]), names.index(match[2].casefold())
        for who, amount, has, what in (
            ("you have", given, holdings[seat][kind], kinds[kind]),
            ("the other player has", asked, holdings[1 - seat][1 - kind], kinds[1 - kind]),
        ):
            if amount > has:
                raise Illegal(f"{who} only {has} {what}")
        return given, kind, asked, 1 - kind

    def spell(self, offer: Offer, task: Task) -> str:
        kinds = fact(task, "kinds", of="Exchange")
        given, kind, asked, other = offer.terms
        return f"{given} {kinds[kind]} for {asked} {kinds[other]}"

    def suits(self, offer: Offer, standing: Offer, task: Task) -> bool:
        given, kind, asked, _ = offer.terms
        gives, theirs, wants, _ = standing.terms
        return kind != theirs and given >= wants and asked <= gives

    def payoffs(self, task: Task, deal: Offer | None) -> tuple[float, float]:
        if deal is None:
            return 0.0, 0.0
        given, kind, asked, other = deal.terms

        def gain(seat: int) -> float:
            worth = fact(task, "own", seat, "worth", of="Exchange")
            change = worth[other] * asked - worth[kind] * given
            return float(change if seat == deal.seat else -change)

        return gain(0), gain(1)
