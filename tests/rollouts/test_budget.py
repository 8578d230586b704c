"""Budgets and prices as settings say them, and what a call costs. That a budget holds stands in
test_ledger.py."""

from __future__ import annotations

from typing import Any

import pytest

from marlora.agents.types import PolicySpec, SettingError, Usage
from marlora.rollouts.budget import Budget, Price, prices_of
from marlora.rollouts.ledger import Ledger
from marlora.rollouts.rewards.helpers import helpers_of

USD = Price("USD", prompt=3.0, sampled=15.0, cached=0.3)


def test_a_call_costs_what_its_price_says() -> None:
    # 600 x 3 + 400 x 0.3 + 200 x 15 = 4,920 per million
    assert USD.cost(Usage(1, 1000, 200, cached_tokens=400)) == pytest.approx(0.00492, rel=1e-12)
    assert Price("USD", 3.0, 15.0).cost(Usage(1, 1000, 0, cached_tokens=400)) == pytest.approx(
        0.003
    )
    assert USD.most(1000, 200) == pytest.approx(0.006, rel=1e-12)
    assert Price("USD", 3.0, 15.0, cached=4.0).most(1000, 200) == pytest.approx(0.007)
    given = {"currency": "USD", "prompt": 3.0, "sampled": 15.0, "cached": 0.3}
    assert Price.of(given, "policies.x.price") == USD


GOOD = {"currency": "USD", "prompt": 1, "sampled": 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": 1, "sampled": 2}, "policies.x.price: a price without a unit; add currency"),
        ({**GOOD, "currency": ""}, "policies.x.price: a price without a unit"),
        ({**GOOD, "smpled": 2}, "policies.x.price.smpled: unknown setting; did you mean 'sampled'"),
        (
            {**GOOD, "prompt": -1},
            "policies.x.price.prompt: expected a number from 0, got a int (not sh",
        ),
        ({**GOOD, "cached": float("nan")}, "policies.x.price.cached: expected a number from 0"),
        ({**GOOD, "sampled": "2"}, "policies.x.price.sampled: expected float | None"),
        ({"currency": "USD", "prompt": 1}, "policies.x.price.sampled: missing"),
        (3, "policies.x.price: expected a mapping, got a int (not shown"),
    ],
)
def test_a_wrong_price_is_one_line(value: Any, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        Price.of(value, "policies.x.price")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"token": 5}, "budget.token: unknown setting; did you mean 'tokens'?"),
        ({"tokens": 0}, "budget.tokens: expected at least 1, got 0"),
        ({"tokens": 1e6}, "budget.tokens: expected int | None, got 1000000.0"),
        ({"calls": True}, "budget.calls: expected int | None, got True"),
        ({"cost": 0}, "budget.cost: expected a number above 0, got 0"),
        ({"cost": float("inf")}, "budget.cost: expected a number above 0, got inf"),
        ({"cost": 1}, "budget.cost: no policy has a price"),
        (5, "budget: expected a mapping, got 5"),
    ],
)
def test_a_wrong_budget_is_one_line(value: Any, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        Budget.of(value, {})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_prices_of_policies() -> None:
    priced = PolicySpec("far", url="http://h/v1", price={**GOOD, "cached": 0})
    free = PolicySpec("near")
    assert prices_of({"far": priced, "near": free}) == {"far": Price("USD", 1, 2, 0)}
    nameless = PolicySpec("far", url="http://h/v1", price={"prompt": 1, "sampled": 2})
    with pytest.raises(SettingError, match=r"^policies\.far\.price: a price without a unit; add"):
        prices_of({"far": nameless})
    wrong = {"critic": {"url": "http://h/v1", "price": {"prompt": 1, "sampled": 2}}}
    with pytest.raises(SettingError, match=r"^helpers\.critic\.price: a price without a unit; add"):
        helpers_of(wrong, ())


def test_a_budget_is_read_from_settings() -> None:
    assert Budget.of(None) == Budget() and Budget.of({"cost": 1}) == Budget(cost=1)
    assert Budget.of('{"tokens": 5}') == Budget(tokens=5)
    assert Budget.of({"cost": 2}, {"p": USD}) == Budget(cost=2)
    mixed = {"p": USD, "q": Price("EUR", 1.0, 1.0), "r": Price("USD", 0.0, 0.0)}
    for make in (lambda: Budget.of({}, mixed), lambda: Ledger(prices=mixed)):
        with pytest.raises(SettingError, match=r"got USD of 'p', EUR of 'q'$"):
            make()
    with pytest.raises(SettingError, match=r"budget\.cost: no policy has a price"):
        Ledger(Budget(cost=1.0))
