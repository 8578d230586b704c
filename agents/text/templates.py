"""Prompt templates: `{field}`s filled in one pass."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..types import SettingError, nearest

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def render(template: str, fields: Mapping[str, Any], *, setting: str, context: str = "") -> str:
    """Fill `{field}`s in one pass, so braces in the inserted text mean nothing; `{{` and `}}` are
    braces.

    Args:
        fields: by name what stands there; a function without arguments is called only if its field
            occurs.
        setting: names the template in errors. `context`: what the fields depend on, such as
            " for task 'x'".

    Raises `SettingError` at an unknown field or an unpaired brace.
    """

    def replace(match: re.Match[str]) -> str:
        name = _name(match, template, setting)
        if name is None:
            return match[0][0]
        if name not in fields:
            raise SettingError(
                f"{setting}: unknown field {{{name}}}{context}; {nearest(name, fields)}"
            )
        value = fields[name]
        return str(value() if callable(value) else value)

    return _FIELD.sub(replace, _text(template, setting))


def fields_in(template: str, *, setting: str) -> list[str]:
    """The fields that a template quotes, each once, in their order. Raises `SettingError` at an
    unpaired brace."""

    def names() -> Iterator[str]:
        for match in _FIELD.finditer(_text(template, setting)):
            name = _name(match, template, setting)
            if name is not None:
                yield name

    return list(dict.fromkeys(names()))


def _text(template: str, setting: str) -> str:
    if not isinstance(template, str):
        raise SettingError(f"{setting}: expected a template such as '{{prompt}}', got {template!r}")
    return template


def _name(match: re.Match[str], template: str, setting: str) -> str | None:
    """The field that a match names, None for a doubled brace."""
    if match[0] in ("{{", "}}"):
        return None
    if match[1] is None:
        raise SettingError(
            f"{setting}: unpaired {match[0]!r} in {template!r}; write {match[0] * 2!r} for a"
            " literal brace"
        )
    return match[1].strip()
