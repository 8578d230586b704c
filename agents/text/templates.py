"""Prompt templates: `{field}` filling in one pass."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..types import SettingError

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def view(template: str, value: Callable[[str], str], where: str) -> str:
    """Fill `{field}`s of a template in one pass, so that braces in what is filled in mean nothing.
    `{{` and `}}` are braces.

    Raises `SettingError` (beginning with `where`) at a lone brace; `value` raises its own at an
    unknown field.
    """

    def put(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] is None:
            raise SettingError(
                f"{where}: lone {match[0]!r} in {template!r}; write {match[0] * 2!r} for a brace"
                " that is meant"
            )
        return value(match[1].strip())

    return _BRACES.sub(put, template)
