"""Helpers: agents outside the team (a proposer, a critic, a judge), which a method asks.

A setting `helpers: {NAME: {...}}` gives each its model: `url` (with `key_env` and `price`) of an
outside one, `base` of one that is served here, or neither: the run's model without an adapter. The
rest are fields of `AgentSpec`. Helpers are metered and recorded as agents are; they stand in
`config.yaml` and never in a checkpoint's `system.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ..agents.settings import mapping
from ..agents.types import BASE, AgentSpec, PolicySpec, SettingError, from_json, nearest
from ..rollouts.budget import Price

OF_AGENT = ("role", "prompt", "sampling", "demos")
OF_POLICY = ("base", "url", "key_env", "price")


@dataclasses.dataclass(frozen=True)
class Helper:
    """An agent outside the team, and the policy that it speaks with."""

    agent: AgentSpec
    policy: PolicySpec


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
