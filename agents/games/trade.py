"""Seller and buyer: one thing, one price. The seller knows what it cost, the buyer what it is
worth; neither knows the other's number.

Setting of the paper: the seller's cost is 40, the buyer would pay up to 60, up to 8 moves; the
seller moves first.
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
class Trade(Game):
    """Agents: seller, buyer. Payoff at a price p: p - cost, and value - p; without a deal 0 each. A
    loss is a player's own affair.

    `meta.highest` bounds prices; `meta.own` holds `{cost: ...}` of the seller and `{value: ...}` of
    the buyer. See `Game`.
    """

    def own(self, task: Task, seat: int) -> Mapping[str, Any]:
        key = ("cost", "value")[seat]
        return {
            "highest": fact(task, "highest", of="Trade"),
            key: fact(task, "own", seat, key, of="Trade"),
        }

    def brief(self, task: Task, seat: int) -> str:
        mine = self.own(task, seat)
        if seat == 0:
            return (
                f"You are the seller. It cost you {mine['cost']}: at a price N you earn N -"
                f" {mine['cost']}, without a deal 0."
            )
        return (
            f"You are the buyer. It is worth {mine['value']} to you: at a price N you gain"
            f" {mine['value']} - N, without a deal 0."
        )

    def terms(self, text: str, task: Task, seat: int) -> tuple[int, ...]:
        return (number(text, self.own(task, seat)["highest"]),)

    def suits(self, offer: Offer, standing: Offer, task: Task) -> bool:
        less = offer.terms[0] <= standing.terms[0]
        return less if offer.seat == 0 else offer.terms[0] >= standing.terms[0]

    def payoffs(self, task: Task, deal: Offer | None) -> tuple[float, float]:
        if deal is None:
            return 0.0, 0.0
        price = deal.terms[0]
        return float(price - self.own(task, 0)["cost"]), float(self.own(task, 1)["value"] - price)
