"""The multi-turn ultimatum: two players share a sum of money if they agree how, and get nothing if
they do not.

The first player offers the second a part; the second accepts, rejects, or offers the first a part;
and so on. The offers of both count what the OTHER is to get. Setting of the paper: 100 dollars, up
to 8 moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..lookup import trusted
from ..types import Task
from .base import Game, Offer, fact, number


@trusted("system")
@dataclass
class Ultimatum(Game):
    """Payoff: the part of `meta.total` that a player ends with. See `Game`."""

    def own(self, task: Task, seat: int) -> Mapping[str, Any]:
        return {"total": fact(task, "total", of="Ultimatum")}

    def brief(self, task: Task, seat: int) -> str:
        total, opens = (
            self.own(task, seat)["total"],
            "You make the first offer." if seat == 0 else "The other makes the first offer.",
        )
        return (
            f"{opens} You want as much of the {total} for yourself as you can get. `offer N` gives"
            " the other N and you the rest."
        )

    def terms(self, text: str, task: Task, seat: int) -> tuple[int, ...]:
        return (number(text, self.own(task, seat)["total"]),)

    def suits(self, offer: Offer, standing: Offer, task: Task) -> bool:
        return self.own(task, offer.seat)["total"] - offer.terms[0] <= standing.terms[0]

    def payoffs(self, task: Task, deal: Offer | None) -> tuple[float, float]:
        if deal is None:
            return 0.0, 0.0
        given = float(deal.terms[0])
        rest = self.own(task, deal.seat)["total"] - given
        return (rest, given) if deal.seat == 0 else (given, rest)
