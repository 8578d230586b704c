"""The flags that a checkpoint's commands need: consent to the code and the models it names outside
marlora."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ...agents.lookup import Untrusted, only_trusted
from ...agents.system import System, system_class, with_settings
from ...agents.tools.tools import resolve_tools
from ...agents.types import AgentSpec, SettingError, from_json
from ..rewards.builtin import resolve_rewards
from ..tasks.registry import load_tasks
from .reader import outside_addresses


def needed_flags(data: Mapping[str, Any], own: type[System] | None = None) -> list[str]:
    """The flags, as words of a command line, without which `marlora eval`, `play`, `collect` and
    `serve` refuse a checkpoint.

    Imports nothing that a stranger may have named. `own`: the System's class, if this process runs
    it already; its arguments are then checked exactly. Without it, arguments of a System outside
    marlora count as code if they look like `module:function` or name a program.
    """
    path, arguments = data["system"]["class"], data["system"]["arguments"]
    foreign = _refused(lambda: system_class(path))
    if own is None and not foreign:
        own = system_class(path)
    names_code = (
        outside_addresses(data)
        or _refused(lambda: resolve_rewards(data["rewards"]))
        or any(_refused(partial(resolve_tools, a["tools"])) for a in _with_tools(data))
        or _refused(lambda: _load_tasks(data["tasks"]))
        or (_refused(lambda: _build(own, data)) if own else _may_name_code(arguments))
    )
    return ["--system", path] * foreign + ["--trust_checkpoint"] * bool(names_code)


def _refused(check: Callable[[], Any]) -> bool:
    """Whether a look-up needs consent. A setting that cannot be used at all says so when the
    checkpoint is opened, with or without a flag."""
    try:
        with only_trusted():
            check()
    except Untrusted:
        return True
    except SettingError:
        return False
    return False


def _with_tools(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [agent for agent in data["agents"] if agent.get("tools")]


def _build(cls: type[System], data: Mapping[str, Any]) -> System:
    agents = tuple(from_json(AgentSpec, agent) for agent in data["agents"])
    return with_settings(cls, {"agents": agents, **data["system"]["arguments"]})


def _load_tasks(tasks: Mapping[str, Any]) -> None:
    if ":" in tasks["name"]:  # other names are those of sets of ours and of files
        load_tasks(tasks["name"], "eval", seed=tasks["seed"], limit=1, **tasks["args"])


def _may_name_code(arguments: Mapping[str, Any]) -> bool:
    """Whether the settings of a System that is not imported name a program or a function."""
    return bool({"command", "main"} & set(arguments)) or _looks_like_a_name(arguments)


def _looks_like_a_name(value: Any) -> bool:
    """Whether a `module:function` stands in a value or anywhere inside it."""
    if isinstance(value, str):
        module, colon, attribute = value.partition(":")
        parts = [*module.split("."), attribute]
        return bool(colon) and all(part.isidentifier() for part in parts)
    inside = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list)) and any(map(_looks_like_a_name, inside))


def meta_flag(data: Mapping[str, Any], meta: Mapping[str, Any], limit: int = 200) -> list[str]:
    """`--meta` of `marlora play` with a task's public meta, where the System's settings show a part
    of it (`{c}`), or where it is a System of one's own, whose code may."""
    shown = json.dumps(dict(meta), ensure_ascii=False, default=str)
    settings = json.dumps([data["system"]["arguments"], data["agents"]], ensure_ascii=False)
    needed = any(f"{{{key}}}" in settings for key in meta) or (
        bool(meta) and _refused(lambda: system_class(data["system"]["class"]))
    )
    return ["--meta", shown] if needed and len(shown) <= limit else []
