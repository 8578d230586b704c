"""Settings as dataclass fields: help, default and bounds stand at the field, one base class checks
them all."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, get_args, get_type_hints

from .text.secrecy import shown_value
from .types import SettingError, closest, nearest

KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "list[str]": (list,),
}


class Metadata(dict[str, Any]):
    """The metadata of a settings field. A copy holds only what argparse takes: HfArgumentParser and
    TrlParser hand a copy to `add_argument`."""

    def copy(self) -> dict[str, Any]:
        return {key: self[key] for key in ("help", "metavar") if key in self}


@dataclass(frozen=True)
class Bounds:
    """What a field's value may be. None: no such bound."""

    choices: tuple[str, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unit: str = ""
    finite: bool = True

    def expected(self, whole: bool) -> str:
        """The numbers allowed, for an error message: `at least 1`, `a number from 0 to 1`,
        `seconds above 0`."""
        if whole and self.at_least is not None and self.at_most is None and self.below is None:
            return f"at least {self.at_least}"
        kind = self.unit or ("a whole number" if whole else "a number")
        parts = [
            f"{word} {bound}"
            for word, bound in (("from", self.at_least), ("above", self.above))
            if bound is not None
        ]
        if self.at_most is not None:
            parts.append(f"{'to' if parts else 'up to'} {self.at_most}")
        if self.below is not None:
            parts.append(f"{'and ' if parts else ''}below {self.below}")
        return " ".join([kind, *parts])

    def allow(self, value: float) -> bool:
        """Whether a number lies inside. NaN never does, infinity only where `finite` is False."""
        return not (
            math.isnan(value)
            or (self.finite and math.isinf(value))
            or (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )


def setting(
    help: str,
    default: Any = None,
    factory: Any = None,
    *,
    choices: Collection[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    unit: str = "",
    finite: bool = True,
) -> Any:
    """A dataclass field of a `Settings` class.

    Args:
        help: the line that `--help` shows.
        default, factory: the value, or the function that makes it, if none is given.
        choices: the texts allowed; of a list, each item is one of them. A mapping's keys will do.
        at_least, above, at_most, below: bounds of a number.
        unit: what errors call the number, such as `seconds`.
        finite: refuse infinity. NaN is always refused.
    """
    names = None if choices is None else tuple(choices)
    metadata = Metadata(
        help=help, bounds=Bounds(names, at_least, above, at_most, below, unit, finite)
    )
    if names is not None:
        metadata["metavar"] = "{" + ",".join(names) + "}"
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class InitSignature:
    """The signature of a class as its `__init__` has it: what `inspect` and notebooks show of a
    class that has a `__new__` too."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        whole = inspect.signature(owner.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])


class Settings:
    """Base of settings dataclasses. After construction every `setting` field is checked: its type,
    its choices, its bounds.

    A class may define `prepare`, which brings values of a file or command line into the form that
    the checks read, and `check`, which compares fields. Both run for every class that defines them,
    bases first, so neither calls `super()`. A keyword that is no setting is an error that names the
    nearest one, as it is in YAML. Raises `SettingError` naming the setting.
    """

    __signature__ = InitSignature()

    def __new__(cls, *given: Any, **named: Any) -> Self:
        known = cls.__signature__.parameters
        for name in named:
            if name not in known:
                raise SettingError(
                    f"{cls.__name__}: unknown setting {name!r}; {nearest(name, sorted(known))}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in _defined(type(self), "prepare"):
            each(self)
        check_fields(self)
        for each in _defined(type(self), "check"):
            each(self)


def check_fields(settings: Any) -> None:
    """Check the value of every `setting` field of a dataclass. Raises `SettingError` naming the
    first that is wrong."""
    cls: type = type(settings)
    for name, (hint, bounds) in _checked_fields(cls).items():
        value = getattr(settings, name)
        check_type(name, hint, value)
        check_bounds(name, hint, bounds, value)


@functools.cache
def _checked_fields(cls: type) -> dict[str, tuple[Any, Bounds]]:
    """By name of a `setting` field: its type and bounds. Other fields may have types that only a
    type checker can resolve."""
    checked = {}
    for f in dataclasses.fields(cls):
        if "bounds" in f.metadata:
            owner = next(c for c in cls.__mro__ if f.name in inspect.get_annotations(c))
            # Not `f.type`: HfArgumentParser writes to it.
            alone = types.SimpleNamespace(
                __annotations__={f.name: inspect.get_annotations(owner)[f.name]}
            )
            hints = get_type_hints(alone, vars(sys.modules[owner.__module__]))
            checked[f.name] = hints[f.name], f.metadata["bounds"]
    return checked


def _defined(cls: type, method: str) -> list[Any]:
    """The functions called `method` that a class and its bases define, bases first."""
    return [vars(c)[method] for c in reversed(cls.__mro__) if method in vars(c)]


def check_type(name: str, hint: Any, value: Any) -> None:
    """Raise `SettingError` unless a value is of the type of its setting: YAML gives values of any
    type. Types other than numbers, texts, flags and lists of texts are not checked."""
    name_of_hint = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    kind = KINDS.get(name_of_hint.removesuffix(" | None"))
    if kind is None or (value is None and name_of_hint.endswith(" | None")):
        return
    wrong = not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind)
    if wrong or (kind == (list,) and not all(isinstance(item, str) for item in value)):
        raise SettingError(f"{name}: expected {name_of_hint}, {shown_value(name, value)}")


def check_bounds(name: str, hint: Any, bounds: Bounds, value: Any) -> None:
    """Raise `SettingError` unless a value is one of the choices and within the bounds of its
    setting."""
    if bounds.choices is not None:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if item is not None and item not in bounds.choices:
                close = closest(item, bounds.choices) if isinstance(item, str) else None
                hint = f"; did you mean {close!r}?" if close else ""
                raise SettingError(
                    f"{name}: expected one of {', '.join(bounds.choices)},"
                    f" {shown_value(name, item)}{hint}"
                )
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not bounds.allow(value):
        whole = float not in (hint, *get_args(hint))
        raise SettingError(f"{name}: expected {bounds.expected(whole)}, {shown_value(name, value)}")


def parsed_mapping(name: str, value: Any) -> dict[str, Any]:
    """A setting that is a mapping, or JSON of one from the command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise SettingError(
                f"{name}: expected a mapping (YAML, JSON or --{name}.KEY),"
                f" {shown_value(name, value)}"
            ) from error
    return mapping(name, value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A copy of a mapping that may be left empty in YAML."""
    if value is not None and not isinstance(value, Mapping):
        raise SettingError(f"{name}: expected a mapping, {shown_value(name, value)}")
    return dict(value or {})
