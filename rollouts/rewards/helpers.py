"""Helpers: agents outside the team (a proposer, a critic, a judge), which a method asks.

A setting `helpers: {NAME: {...}}` gives each its model: `url` (with `key_env` and `price`) of an
outside one, `base` of one that is served here, or neither: the run's model without an adapter. The
rest are fields of `AgentSpec`. Helpers are metered and recorded as agents are. They stand in
`config.yaml`; a checkpoint's `system.json` names those that its rewards ask, and no others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ...agents.settings import mapping
from ...agents.types import BASE, AgentSpec, PolicySpec, SettingError, from_json, nearest, to_json
from ..budget import Price
from .judge import Judge
from .scoring import RewardFn

OF_AGENT = ("role", "prompt", "sampling", "demos")
OF_POLICY = ("base", "url", "key_env", "price")


@dataclasses.dataclass(frozen=True)
class Helper:
    """An agent outside the team, and the policy that it speaks with."""

    agent: AgentSpec
    policy: PolicySpec

    def settings(self) -> dict[str, Any]:
        """What `helpers_of` makes it again from: the fields that differ from their defaults."""
        given, plain = to_json(self.agent), to_json(AgentSpec(self.agent.name))
        own = {key: given[key] for key in OF_AGENT if given[key] != plain[key]}
        given, plain = to_json(self.policy), to_json(PolicySpec(self.policy.name))
        return own | {key: given[key] for key in OF_POLICY if given[key] != plain[key]}


def helpers_of(given: Mapping[str, Any], taken: Collection[str]) -> dict[str, Helper]:
    """The helpers that a setting names. `taken`: names of agents and policies of the team. Raises
    `SettingError` that names the helper's setting."""
    helpers: dict[str, Helper] = {}
    for name, fields in given.items():
        where, own = f"helpers.{name}", mapping(f"helpers.{name}", fields)
        if name in taken:
            raise SettingError(
                f"{where}: the team has an agent or a policy of that name; name the helper"
                " otherwise"
            )
        for key in own:
            if key not in (*OF_AGENT, *OF_POLICY):
                hint = nearest(key, (*OF_AGENT, *OF_POLICY))
                raise SettingError(f"{where}.{key}: unknown field of a helper; {hint}")
        model = {key: own[key] for key in OF_POLICY if key in own}
        if ("key_env" in model or "price" in model) and not model.get("url"):
            raise SettingError(
                f"{where}: key_env and price are those of an outside model; give url"
            )
        if model.get("price"):
            Price.of(model["price"], f"{where}.price")
        speaks = name if model.get("url") or model.get("base") else BASE
        spec = {key: own[key] for key in OF_AGENT if key in own}
        agent = from_json(AgentSpec, {"name": name, "policy": speaks, **spec}, where)
        frozen = {"name": speaks, "trainable": False, **model}
        helpers[name] = Helper(agent, from_json(PolicySpec, frozen, where))
    return helpers


def with_judges(
    helpers: Mapping[str, Helper], rewards: Iterable[RewardFn], taken: Collection[str]
) -> tuple[dict[str, Helper], list[RewardFn]]:
    """The helpers, with those that `judge(URL, MODEL)` names, and the rewards, with each judge as
    the helper that it is. `taken`: names of agents and policies of the team. Raises `SettingError`
    for a judge that is no helper, or whose name is taken."""
    served, bound = dict(helpers), list[RewardFn]()
    for fn in rewards:
        if not isinstance(fn, Judge):
            bound.append(fn)
            continue
        name = fn.agent.name
        if fn.policy is None:
            if name not in helpers:
                raise SettingError(
                    f"reward {fn.__qualname__}: no helper {name!r}; {nearest(name, list(helpers))}."
                    f" Give its model: helpers: {{{name}: {{url: http://HOST:PORT/v1, base:"
                    " MODEL}}, or {} for the run's own model"
                )
            bound.append(fn.served_by(helpers[name].agent, helpers[name].policy))
            continue
        if name in (*taken, *helpers):
            raise SettingError(
                f"reward {fn.__qualname__}: an agent, a policy or a helper is called {name!r}; put"
                " the judge among `helpers` under another name and take judge(NAME)"
            )
        served[name] = Helper(fn.agent, fn.policy)
        bound.append(fn)
    return served, bound


def asked_helpers(rewards: Iterable[RewardFn]) -> dict[str, Helper]:
    """The helpers that judges among these rewards name (`judge(HELPER)`), as far as their models
    are known. A `judge(URL, MODEL)` says itself whom it asks."""
    return {
        fn.agent.name: Helper(fn.agent, fn.policy)
        for fn in rewards
        if isinstance(fn, Judge) and fn.of_helper and fn.policy is not None
    }


def served(rewards: Iterable[RewardFn], helpers: Mapping[str, Helper]) -> list[RewardFn]:
    """The rewards, with each judge of one of these helpers as that helper. A judge of another
    raises when it is to be asked."""
    return [
        fn.served_by(helpers[fn.agent.name].agent, helpers[fn.agent.name].policy)
        if isinstance(fn, Judge) and fn.of_helper and fn.agent.name in helpers
        else fn
        for fn in rewards
    ]
