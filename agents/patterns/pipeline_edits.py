"""Edits of a pipeline (`pipeline.py`), as a model proposes them: changed parts of a role's prompt,
operations on a state, operations on the whole. All edits of a proposal are made, or none.

Operations are mappings such as `{"op": "add_role", "role": "editor", "about": "..."}` (agent
symbolic learning, arXiv 2406.18532). Against the authors' code: a role or a state that was added
can be changed and deleted like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..text.templates import fields_in
from ..types import SettingError, nearest
from .pipeline import role_of

Value = dict[str, Any]


class IllegalEdit(ValueError):
    """An edit that cannot be made; the text says why."""


@dataclass(frozen=True)
class Edit:
    """An operation: what it does to the states (with the state that it is about), the keys that it
    needs, and those that it may have."""

    make: Callable[[Value, str, Mapping[str, Any]], None]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()


def with_parts(pipeline: Mapping[str, Any], place: str, changes: Any) -> Value:
    """The pipeline with these texts in place of parts of the role at STATE/ROLE, or of its
    `template`, whose fields have to stay; none changes nothing. Raises `IllegalEdit`."""
    changed: Value = copy.deepcopy(dict(pipeline))
    role = _role_at(changed, place)
    if not isinstance(changes, Mapping):
        raise IllegalEdit(f"{place}: expected a mapping of changed parts, got {changes!r:.60}")
    for name, text in changes.items():
        if not isinstance(text, str):
            raise IllegalEdit(f"{place}.{name}: expected a text, got {text!r:.60}")
        if name == "template":
            _check_template(place, role["template"], text)
            role["template"] = text
        elif name in role["parts"]:
            role["parts"][name] = text
        else:
            raise IllegalEdit(f"{place}: no part {name!r:.60}; {nearest(name, role['parts'])}")
    return changed


def with_operations(
    pipeline: Mapping[str, Any], operations: Any, *, agent: str, state: str = ""
) -> Value:
    """The pipeline after these operations: on one state, or, where `state` is "", on the whole.
    `agent` speaks roles that name none. Raises `IllegalEdit`; what comes of it may still be no
    pipeline (`Pipeline.problem`)."""
    changed: Value = copy.deepcopy(dict(pipeline))
    if not isinstance(operations, list):
        raise IllegalEdit(f"expected a list of operations, got {operations!r:.60}")
    known = ON_STATE if state else ON_PIPELINE
    for number, given in enumerate(operations, 1):
        if not isinstance(given, Mapping) or not isinstance(given.get("op"), str):
            raise IllegalEdit(f"operation {number}: expected a mapping with op, got {given!r:.60}")
        name = given["op"]
        if name not in known:
            raise IllegalEdit(f"operation {number}: no {name!r:.60}; {nearest(name, known)}")
        edit, keys = known[name], set(given) - {"op"}
        if missing := [key for key in edit.needs if key not in keys]:
            raise IllegalEdit(f"operation {number} ({name}): {missing[0]} is missing")
        if unknown := keys - {*edit.needs, *edit.takes}:
            raise IllegalEdit(f"operation {number} ({name}): unknown key {min(unknown)!r:.60}")
        edit.make(changed["states"], state, {"agent": agent, **given})
    return changed


def _role_at(pipeline: Value, place: str) -> Value:
    state, _, role = place.partition("/")
    try:
        found: Value = pipeline["states"][state]["roles"][role]
    except KeyError as error:
        raise IllegalEdit(f"{place}: there is no such role") from error
    return found


def _check_template(place: str, before: str, after: str) -> None:
    try:
        fields = set(fields_in(after, setting=f"{place}.template"))
    except SettingError as error:
        raise IllegalEdit(str(error)) from error
    needed = set(fields_in(before, setting=f"{place}.template"))
    if fields != needed:
        lost, added = needed - fields, fields - needed
        what = f"it lacks {{{min(lost)}}}" if lost else f"unknown field {{{min(added)}}}"
        raise IllegalEdit(f"{place}.template: its fields have to stay; {what}")


def _existing(things: Value, kind: str, name: Any) -> Value:
    if not isinstance(name, str) or name not in things:
        raise IllegalEdit(f"no {kind} {name!r:.60}; {nearest(str(name), things)}")
    found: Value = things[name]
    return found


def _add(things: Value, kind: str, name: Any, content: Value) -> None:
    if not isinstance(name, str) or name in things:
        raise IllegalEdit(f"{kind} {name!r:.60}: expected a name that is not taken")
    things[name] = content


def _names(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise IllegalEdit(f"next: expected a list of names of states, got {given!r:.60}")
    return given


def _new_role(given: Mapping[str, Any]) -> Value:
    return role_of(given["agent"], given["about"], given.get("instruction", ""))


def _add_role(states: Value, state: str, given: Mapping[str, Any]) -> None:
    _add(_existing(states, "state", state)["roles"], "role", given["role"], _new_role(given))


def _delete_role(states: Value, state: str, given: Mapping[str, Any]) -> None:
    own = _existing(states, "state", state)
    _existing(own["roles"], "role", given["role"])
    del own["roles"][given["role"]]
    if own["first"] == given["role"] and own["roles"]:
        own["first"] = next(iter(own["roles"]))


def _describe_role(states: Value, state: str, given: Mapping[str, Any]) -> None:
    roles = _existing(states, "state", state)["roles"]
    _existing(roles, "role", given["role"])["about"] = given["about"]


def _control(states: Value, state: str, given: Mapping[str, Any]) -> None:
    own = _existing(states, "state", state)
    own.update({key: given[key] for key in ("route", "first") if key in given})


def _describe_own(states: Value, state: str, given: Mapping[str, Any]) -> None:
    _existing(states, "state", state)["about"] = given["about"]


def _add_state(states: Value, state: str, given: Mapping[str, Any]) -> None:
    name = given["state"]
    made = {
        "about": given["about"],
        "roles": {name: _new_role(given)},
        "route": "order",
        "first": name,
        "next": _names(given["next"]),
    }
    _add(states, "state", name, made)


def _delete_state(states: Value, state: str, given: Mapping[str, Any]) -> None:
    """Edges to it are gone too."""
    name = given["state"]
    _existing(states, "state", name)
    del states[name]
    for own in states.values():
        own["next"] = [other for other in own["next"] if other != name]


def _describe_state(states: Value, state: str, given: Mapping[str, Any]) -> None:
    _existing(states, "state", given["state"])["about"] = given["about"]


def _connect(states: Value, state: str, given: Mapping[str, Any]) -> None:
    _existing(states, "state", given["state"])["next"] = _names(given["next"])


ON_STATE: Mapping[str, Edit] = {
    "add_role": Edit(_add_role, ("role", "about"), ("instruction", "agent")),
    "delete_role": Edit(_delete_role, ("role",)),
    "update_role_description": Edit(_describe_role, ("role", "about")),
    "update_controller": Edit(_control, (), ("route", "first")),
    "update_node_description": Edit(_describe_own, ("about",)),
}
ON_PIPELINE: Mapping[str, Edit] = {
    "add_node": Edit(_add_state, ("state", "about", "next"), ("instruction", "agent")),
    "delete_node": Edit(_delete_state, ("state",)),
    "update_node_description": Edit(_describe_state, ("state", "about")),
    "update_edges": Edit(_connect, ("state", "next")),
}


def operations_in_words(kinds: Mapping[str, Edit]) -> str:
    """A line per operation, as a prompt shows them."""

    def line(name: str, edit: Edit) -> str:
        keys = [*edit.needs, *(f"{key} (optional)" for key in edit.takes)]
        return f"{name}: {', '.join(keys)}"

    return "\n".join(line(name, edit) for name, edit in kinds.items())
