"""Functions that settings name: shipped ones by a short name, anyone's as `module:function`, made ones as `maker(text)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from .types import SettingError, nearest


def function_named(kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that a setting names. `maker(text)` is what the function named `maker` makes of the text.

    Raises `SettingError` with `kind`, the name, and the nearest shipped one.
    """
    maker, bracket, text = name.partition("(")
    if bracket and text.endswith(")"):
        return function_named(kind, maker, shipped)(text[:-1])
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
