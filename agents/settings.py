"""Settings as dataclass fields: help, defaults, and the check of a value's type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any, get_args

from .secrecy import told_value
from .types import SettingError


def help_of(text: str, default: Any = None, factory: Any = None) -> Any:
    """A dataclass field with the one line that `--help` shows."""
    return (
        field(default_factory=factory, metadata={"help": text})
        if factory
        else field(default=default, metadata={"help": text})
    )


def parsed_mapping(name: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping, or JSON of one from the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            told = told_value(name, value)
            raise SettingError(
                f"{name}: expected a mapping (YAML, JSON or --{name}.KEY), {told}"
            ) from error
    return mapping(name, value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A copy of a mapping that may be left empty in YAML."""
    if value is not None and not isinstance(value, Mapping):
        raise SettingError(f"{name}: expected a mapping, {told_value(name, value)}")
    return dict(value or {})


def check_type(name: str, hint: Any, value: Any) -> None:
    """YAML passes a value of any type through the parser: check numbers, texts, flags and lists
    here."""
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "list[str]": (list,),
    }
    name_of_hint = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    kind = kinds.get(name_of_hint.removesuffix(" | None"))
    if value is None and name_of_hint.endswith(" | None"):
        return
    wrong = kind is not None and (
        not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind)
    )
    if wrong or (kind == (list,) and not all(isinstance(item, str) for item in value)):
        raise SettingError(f"{name}: expected {name_of_hint}, got {value!r}")
