"""Functions that settings name: shipped ones by a short name, anyone's as `module:function`, made
ones as `maker(text)`.

Settings of a user's own may name anything. A checkpoint may come from a stranger, so what it names
is looked up under `only_trusted()`: there the one rule below decides, before anything is imported,
whatever asks for the name and whenever.

The rule: the name is a shipped short name, or `module:name` of a file of this package whose object
carries the mark of `@trusted(KIND)` (or stands in the table of shipped ones). `maker(text)` needs
the mark `KIND maker`: its text is a stranger's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from .types import SettingError, nearest

T = TypeVar("T")

AGREE = "give --trust_checkpoint if you know where it comes from"
ROOMS = ("agents", "rollouts", "trainers")  # where something may be marked
_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).resolve().parents[1]
_MARKED: dict[
    tuple[str, int], Any
] = {}  # (kind, id) -> the object; holding it keeps its id from being used again
_ONLY_TRUSTED: ContextVar[bool] = ContextVar("only_trusted", default=False)


class Untrusted(SettingError):
    """A name that a checkpoint may not use unless its reader agrees. `kind` and `name` say
    which."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name}; {AGREE}")
        self.kind, self.name = kind, name


def trusted(*kinds: str) -> Callable[[T], T]:
    """Mark what follows as something that a checkpoint may name without its reader's agreement.

    Args:
        kinds: what it may be named as: `system`, `tasks`, `reward`, `tool`, `verifier`, `operator`,
            or one of these and ` maker`, for a function that a checkpoint may call with a text of
            its own. Nothing that is marked may run, import or fetch what its arguments say.
    """

    def mark(found: T) -> T:
        for kind in kinds:
            _MARKED[kind, id(found)] = found
        return found

    return mark


def is_trusted(kind: str, found: Any) -> bool:
    """Is this very object marked? A subclass, a copy or a wrapper of a marked one is not."""
    return _MARKED.get((kind, id(found)), _MARKED) is found


@contextlib.contextmanager
def only_trusted(on: bool = True) -> Iterator[None]:
    """Inside, in this task and those it starts, names are looked up as a stranger's. `on` False
    changes nothing."""
    token = _ONLY_TRUSTED.set(on or _ONLY_TRUSTED.get())
    try:
        yield
    finally:
        _ONLY_TRUSTED.reset(token)


def needs_trust(kind: str, name: str) -> None:
    """Raise `Untrusted` under `only_trusted()`: for what is never to be done on a stranger's word,
    such as running a command."""
    if _ONLY_TRUSTED.get():
        raise Untrusted(kind, name)


def load_function(
    kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The function that a setting names. `maker(text)` is what the function named `maker` makes of
    the text.

    Raises `SettingError` with `kind`, the name, and the nearest shipped one; `Untrusted` under
    `only_trusted()`.
    """
    if not isinstance(name, str):
        raise SettingError(f"{kind} {name!r:.80}: expected a name, got a {type(name).__name__}")
    maker, bracket, text = name.partition("(")
    makes = bool(bracket) and text.endswith(")")
    found = _found(
        kind, f"{kind} maker" if makes else kind, maker if makes else name, shipped, name
    )
    if not callable(found):
        raise SettingError(f"{kind} {name!r}: expected a function, found a {type(found).__name__}")
    return found(text[:-1]) if makes else found


def check_name(kind: str, name: str, shipped: Mapping[str, Callable[..., Any]]) -> None:
    """Judge a name that is looked up later: raises `Untrusted` now, where the lookup would. Calls
    no maker."""
    if _ONLY_TRUSTED.get():
        maker, bracket, text = name.partition("(")
        makes = bool(bracket) and text.endswith(")")
        _found(kind, f"{kind} maker" if makes else kind, maker if makes else name, shipped, name)


def object_named(kind: str, name: str, expected: str = "module:function") -> Any:
    """What `module:name` names. Raises `SettingError` if it cannot be imported; `Untrusted` under
    `only_trusted()`."""
    return _imported(kind, kind, name, {}, name, expected)


def _found(kind: str, mark: str, name: str, shipped: Mapping[str, Any], told: str) -> Any:
    if name in shipped:
        found = shipped[name]
        if mark != kind and _ONLY_TRUSTED.get() and not is_trusted(mark, found):
            raise Untrusted(kind, told)
        return found
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise SettingError(
            f"{kind} {told!r}: no such {kind}; {nearest(name, shipped)}; your own are named"
            " module:function"
        )
    return _imported(kind, mark, name, shipped, told, "module:function")


def _imported(
    kind: str, mark: str, name: str, shipped: Mapping[str, Any], told: str, expected: str
) -> Any:
    module, _, attribute = name.partition(":")
    strict = _ONLY_TRUSTED.get()
    if strict and not (attribute.isidentifier() and _is_ours(module)):
        raise Untrusted(kind, told)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SettingError(
            f"{kind} {told!r}: cannot be imported ({error}); expected {expected}"
        ) from error
    in_table = mark == kind and any(each is found for each in shipped.values())
    if strict and not (in_table or is_trusted(mark, found)):
        raise Untrusted(kind, told)
    return found


def _is_ours(module: str) -> bool:
    """Is `module` a file of this package, and the file that Python would import, or has imported,
    for that name?

    Folders without `__init__.py` can be continued anywhere on the path, so the beginning of a name
    says nothing.
    """
    package, *parts = module.split(".")
    if package != _PACKAGE or len(parts) < 2 or parts[0] not in ROOMS:
        return False
    if not all(part.isascii() and part.isidentifier() for part in parts):
        return False
    file = _ROOT.joinpath(*parts).with_suffix(".py")
    if not file.is_file():
        return False
    loaded = sys.modules.get(module)
    spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(module)
    return (
        spec is not None
        and spec.origin is not None
        and Path(spec.origin).resolve() == file.resolve()
    )
