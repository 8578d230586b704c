"""Functions that settings name: shipped ones by a short name, anyone's as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from ..agents.types import SettingError, nearest


def function_named(kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that a setting names. Raises `SettingError` with `kind`, the name, and the nearest shipped one."""
    if name in shipped:
        return shipped[name]
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise SettingError(f"{kind} {name!r}: no such {kind}; {nearest(name, shipped)}; your own are named module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingError(f"{kind} {name!r}: cannot be imported ({error}); expected module:function") from error
    if not callable(found):
        raise SettingError(f"{kind} {name!r}: expected a function, found a {type(found).__name__}")
    return found
