"""The state of a team: which adapter versions answer, and the values a method may change.

`TeamState` is a value: equal content has an equal key. `Param` says what a system lets methods
change, and which values it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .types import AgentSpec, Message, PolicySpec, SettingError, from_json, nearest, to_json

Kind = Literal[
    "text", "demos", "program", "choice", "number", "flag", "structure", "logits", "weights"
]


@dataclass(frozen=True)
class TeamState:
    """What a team plays with.

    Args:
        versions: adapter version by policy; a policy that is absent answers as the bare base.
        values: texts, demonstrations, programs, choices and logits by name.
        outside: address and model of every outside model, by policy.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits; equal content, equal key. Raises `SettingError` for a value that is not
        made of JSON values."""
        return content_key(to_json(self), "values")

    def with_values(self, values: Mapping[str, Any]) -> TeamState:
        """The state with these values put in; others stay."""
        return dataclasses.replace(self, values={**self.values, **values})

    def with_versions(self, versions: Mapping[str, str]) -> TeamState:
        """The state with these adapter versions instead of its own."""
        return dataclasses.replace(self, versions=dict(versions))

    def of(self, policies: Sequence[str]) -> TeamState:
        """The state with the versions of these policies only, in their order."""
        versions = {name: self.versions[name] for name in policies if name in self.versions}
        same = list(versions) == list(self.versions)
        return self if same else dataclasses.replace(self, versions=versions)


def outside_models(policies: Mapping[str, PolicySpec]) -> dict[str, str]:
    """Address and model of the policies that are not served here."""
    return {
        name: f"{policy.url} {policy.base or name}"
        for name, policy in policies.items()
        if policy.url
    }


def content_key(content: Any, where: str) -> str:
    """16 hex digits of JSON content, whatever the order of its keys. `where` names it in the
    `SettingError` about what is not JSON."""
    try:
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{where}: expected texts, numbers, lists and mappings, which JSON holds ({error})"
        ) from error
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Param:
    """Something of a system that a method may change, by the name it has in `values`.

    Args:
        name: `NAME.prompt`, `NAME.demos`, `NAME.policy`, or a name of the system's own.
        value: what holds where `values` has nothing of this name.
        kind: what a value looks like: `text`, `demos` (messages, user and assistant in turn),
            `program` (source that runs in the sandbox), `choice` (one of `options`), `number`,
            `flag` (true or false), `structure` (a mapping whose form `legal` knows),
            `logits` (a logit per option, or such mappings by decision), `weights` (of a small
            network: packed numbers by name of a tensor).
        agent: whose it is; "" is the system's.
        role: one line for people and for models that propose a value.
        options: of a choice, or the names that logits are by; empty where any name is possible.
        legal: says why a value is refused, None if it is not.
    """

    name: str
    value: Any
    kind: Kind
    agent: str = ""
    role: str = ""
    options: tuple[str, ...] = ()
    legal: Callable[[Any], str | None] | None = None

    def problem(self, value: Any) -> str | None:
        """Why this value is refused; None if it may be set."""
        fault = _KINDS[self.kind](self, value)
        return fault or (self.legal(value) if self.legal else None)


def _text(param: Param, value: Any) -> str | None:
    return None if isinstance(value, str) else f"expected a text, got {value!r:.60}"


def _number(param: Param, value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = whole or (isinstance(value, float) and math.isfinite(value))
    return None if number else f"expected a number, got {value!r:.60}"


def _flag(param: Param, value: Any) -> str | None:
    return None if isinstance(value, bool) else f"expected true or false, got {value!r:.60}"


def _structure(param: Param, value: Any) -> str | None:
    return None if isinstance(value, Mapping) else f"expected a mapping, got {value!r:.60}"


def _choice(param: Param, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"expected a name, got {value!r:.60}"
    if param.options and value not in param.options:
        return f"expected one of {', '.join(param.options)}, got {value!r:.60}"
    return None


def _demos(param: Param, value: Any) -> str | None:
    if not isinstance(value, (list, tuple)):
        return f"expected a list of messages, got {value!r:.60}"
    try:
        for message in value:
            if not isinstance(message, Message):
                from_json(Message, message, param.name)
    except SettingError as error:
        return str(error)
    roles = [m.role if isinstance(m, Message) else m["role"] for m in value]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return f"expected user and assistant in turn, got {', '.join(roles)[:60]}"
    return None


def _logits(param: Param, value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"expected logits by option, got {value!r:.60}"
    for name, each in value.items():
        if param.options and name not in param.options:
            return f"no logits of {name!r:.60}; {nearest(str(name), param.options)}"
        if isinstance(each, Mapping):
            fault = _logits(dataclasses.replace(param, options=()), each)
        else:
            fault = _number(param, each)
        if fault:
            return f"{name}: {fault}"
    return None


def _weights(param: Param, value: Any) -> str | None:
    packed = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    return None if packed else f"expected packed numbers by name of a tensor, got {value!r:.60}"


_KINDS: Mapping[str, Callable[[Param, Any], str | None]] = {
    "text": _text,
    "program": _text,
    "number": _number,
    "flag": _flag,
    "structure": _structure,
    "choice": _choice,
    "demos": _demos,
    "logits": _logits,
    "weights": _weights,
}


def agent_params(agents: Sequence[AgentSpec]) -> tuple[Param, ...]:
    """The params that every agent has: its prompt, its demonstrations and its policy."""
    return tuple(
        param
        for spec in agents
        for param in (
            Param(f"{spec.name}.prompt", spec.prompt, "text", spec.name, spec.role),
            Param(f"{spec.name}.demos", to_json(spec.demos), "demos", spec.name, spec.role),
            Param(f"{spec.name}.policy", spec.policy, "choice", spec.name, spec.role),
        )
    )


def check_values(params: Sequence[Param], values: Mapping[str, Any], where: str = "values") -> None:
    """Raise `SettingError` at a value that no param has, or that its param refuses."""
    known = {param.name: param for param in params}
    for name, value in values.items():
        if name not in known:
            raise SettingError(f"{where}.{name}: no such param; {nearest(name, known)}")
        fault = known[name].problem(value)
        if fault:
            raise SettingError(f"{where}.{name}: {fault}")
