"""The budget of a run and the prices of policies, as settings say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..agents.settings import Bounds, check_bounds, check_type, mapping, parsed_mapping
from ..agents.types import PolicySpec, SettingError, Usage, nearest

MILLION = 1_000_000
ROUNDING = 1e-9  # share of a limit of money that sums of floats may be off by


@dataclass(frozen=True)
class Price:
    """What a policy's tokens cost, in `currency` per million tokens. `cached`: of prompt tokens
    that the server had in its cache; None: as other prompt tokens."""

    currency: str
    prompt: float
    sampled: float
    cached: float | None = None

    @classmethod
    def of(cls, value: Any, where: str) -> Self:
        """The price that a mapping says. Raises `SettingError` naming `where`."""
        given = mapping(where, value)
        _check_keys(where, given, [f.name for f in dataclasses.fields(cls)])
        currency = given.get("currency")
        if not isinstance(currency, str) or not currency.strip():
            raise SettingError(
                f"{where}: a price without a unit; add currency, such as USD (amounts are per"
                " million tokens)"
            )
        for name in ("prompt", "sampled"):
            if given.get(name) is None:
                raise SettingError(f"{where}.{name}: missing; 0 is for tokens that cost nothing")
        for name in ("prompt", "sampled", "cached"):
            check_type(f"{where}.{name}", float | None, given.get(name))
            check_bounds(f"{where}.{name}", float, Bounds(at_least=0), given.get(name))
        return cls(**given)

    def cost(self, usage: Usage) -> float:
        """What a server charges for one call. `cached_tokens` are among the `prompt_tokens`."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        rate = self.prompt if self.cached is None else self.cached
        amount = (usage.prompt_tokens - cached) * self.prompt + cached * rate
        return (amount + usage.sampled_tokens * self.sampled) / MILLION

    def most(self, prompt_tokens: int, sampled_tokens: int) -> float:
        """The most that a call can cost, whatever the server has in its cache."""
        highest = max(self.prompt, self.cached or 0.0)
        return (prompt_tokens * highest + sampled_tokens * self.sampled) / MILLION


def _check_keys(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise SettingError(f"{where}.{key}: unknown setting; {nearest(str(key), known)}")


def common_currency(prices: Mapping[str, Price]) -> str:
    """The currency of all prices, "" if there are none. Raises `SettingError` if they have
    several."""
    first: dict[str, str] = {}
    for policy, price in prices.items():
        first.setdefault(price.currency, policy)
    if len(first) > 1:
        named = ", ".join(f"{currency} of {policy!r}" for currency, policy in first.items())
        raise SettingError(f"price: one currency for all policies expected, got {named}")
    return next(iter(first), "")


@dataclass(frozen=True)
class Budget:
    """The most that a run may spend on anything but evaluation; None: no limit. `tokens` are those
    of prompts and sampled ones, `cost` is in the currency of the prices."""

    tokens: int | None = None
    calls: int | None = None
    cost: float | None = None

    @classmethod
    def of(cls, value: Any, prices: Mapping[str, Price] | None = None) -> Self:
        """The budget that the setting `budget` says: a mapping, or JSON of one. Raises
        `SettingError`, also for a limit of money where no policy has a price (`prices` None: they
        are not known yet; the ledger checks them)."""
        given = parsed_mapping("budget", value)
        _check_keys("budget", given, [f.name for f in dataclasses.fields(cls)])
        for name in ("tokens", "calls"):
            check_type(f"budget.{name}", int | None, given.get(name))
            check_bounds(f"budget.{name}", int, Bounds(at_least=1), given.get(name))
        check_type("budget.cost", float | None, given.get("cost"))
        check_bounds("budget.cost", float, Bounds(above=0), given.get("cost"))
        budget = cls(**given)
        if prices is not None:
            budget.check(prices)
        return budget

    def check(self, prices: Mapping[str, Price]) -> None:
        """Raise `SettingError` unless money can be counted where it is limited."""
        if not common_currency(prices) and self.cost is not None:
            raise SettingError(
                "budget.cost: no policy has a price, so no money can be counted; give a price to"
                " each outside model, or limit tokens"
            )

    def exceeded(self, usage: Usage) -> str:
        """The name of the first limit that this usage is above, "" if it is within all."""
        for name, amount in amounts(usage).items():
            limit = getattr(self, name)
            slack = limit * ROUNDING if limit is not None and name == "cost" else 0
            if limit is not None and amount > limit + slack:
                return name
        return ""


def amounts(usage: Usage) -> dict[str, float]:
    """What a budget counts of a usage, by the name of the limit."""
    tokens = usage.prompt_tokens + usage.sampled_tokens
    return {"tokens": tokens, "calls": usage.calls, "cost": usage.cost}


def prices_of(policies: Mapping[str, PolicySpec]) -> dict[str, Price]:
    """The prices of the policies that have one."""
    return {
        name: Price.of(policy.price, f"policies.{name}.price")
        for name, policy in policies.items()
        if policy.price
    }
