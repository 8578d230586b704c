"""Validation of request bodies: JSON within bounds, and readers of single fields, whose errors name
the field.

A reader takes a value and its path (`messages[3].role`), and returns it with the type it must have,
or raises `BadRequest`. Bounds that hold for every field are checked once for the whole body.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ....agents.types import nearest

MAX_DEPTH = 64  # brackets inside brackets
MAX_ITEMS = 4096  # messages, parts, tools, calls: what one list of a body holds
MAX_VALUES = 250_000  # texts, numbers, lists and objects of one body
MAX_DIGITS = 40  # of a whole number; longer ones are read as floats, and no field takes infinity

HALF = "half of a surrogate pair, which is no character"

_MARKS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class BadRequest(ValueError):
    """A request that is answered with an error: HTTP status, message, code, and the field it is
    about, if any."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_request_error",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The error reply, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def wrong(where: str, problem: str, code: str = "invalid_request_error") -> BadRequest:
    """A 400 about the field at `where`."""
    return BadRequest(400, f"{where}: {problem}", code, where)


def brief(value: Any) -> str:
    """A value, shortened for an error message."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value[:40]) if isinstance(value, str) else f"{value!r:.40}"


# the whole body


def parse_body(raw: bytes) -> Any:
    """The JSON of a body. Raises `BadRequest` if it is not JSON or exceeds a bound."""
    try:
        document = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(
            400, f"the body is not UTF-8: byte {error.start} cannot be read"
        ) from error
    try:
        body = json.loads(document, parse_int=_whole_number, object_pairs_hook=_unique)
    except RecursionError as error:
        raise _too_deep(document) from error
    except ValueError as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(400, f"the body is not JSON: {str(error)[:100]}") from error
    check_bounds(body)
    return body


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise wrong(key[:80], "given twice in one object")
            seen.add(key)
    return values


def _too_deep(document: str) -> BadRequest:
    """The error of a body too deep for Python's parser, with the field of the outermost object it
    stands in."""
    depth, field = 0, ""
    for match in _MARKS.finditer(document):
        mark = match[0]
        if mark in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                break
        elif mark in ("]", "}"):
            depth -= 1
        elif depth == 1:
            field = mark[1:-1][:80]
    return wrong(field or "the body", f"nested more than {MAX_DEPTH} deep")


def check_bounds(body: Any) -> None:
    """Check that every text can be written as UTF-8, every number is finite, and depth and size are
    within bounds."""
    inner: list[Iterator[tuple[str | int, Any]]] = [iter([("", body)])]
    path: list[str | int] = []  # of the current value, "" first
    count = 0
    while inner:
        key, value = next(inner[-1], (None, None))
        if key is None:
            inner.pop()
            path = path[:-1]
            continue
        count += 1
        if isinstance(key, str) and not encodable(key):
            raise wrong(spelt(path), f"the key {key[:40]!r} holds {HALF}")
        if problem := _unfit(value, len(inner), count):
            raise wrong(spelt([*path, key]), problem)
        if isinstance(value, (dict, list)):
            inner.append(iter(value.items() if isinstance(value, dict) else enumerate(value)))
            path.append(key)


def _unfit(value: Any, depth: int, count: int) -> str:
    if isinstance(value, str) and not encodable(value):
        return f"holds {HALF}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value}"
    if depth > MAX_DEPTH and isinstance(value, (dict, list)):
        return f"nested more than {MAX_DEPTH} deep"
    return f"the body holds more than {MAX_VALUES} values up to here" if count > MAX_VALUES else ""


def spelt(path: Sequence[str | int]) -> str:
    """A path as text: `messages[3].role`."""
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key[:80]}" for key in path[1:])
    return name.removeprefix(".")[:200] or "the body"


def inside(where: str, key: str) -> str:
    """The path of a key of an object."""
    return f"{where}.{key[:80]}" if where else key[:80]


def encodable(value: str) -> bool:
    """Whether a text can be written as UTF-8 (it has no lone surrogate)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def loaded(document: str) -> Any:
    """The JSON value of a text by a program or a model; the text itself if it is not JSON within
    bounds."""
    try:
        return parse_body(document.encode())
    except BadRequest:
        return document


# single fields


def check_body(body: Any, known: Collection[str]) -> None:
    """Raise `BadRequest` unless the body is an object of known keys."""
    if not isinstance(body, dict):
        raise BadRequest(400, f"expected a JSON object, got {brief(body)}")
    only(body, known)


def only(body: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Raise `BadRequest` for an unknown key, with the nearest known one."""
    for key in map(str, body):  # a program in this process may return keys of any type
        if key not in known:
            hint = nearest(key[:80], list(known))
            raise wrong(inside(where, key), f"not understood here; {hint}", "unknown_parameter")


def text(value: Any, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise wrong(where, f"expected a text, got {brief(value)}")
    return value


def optional_text(value: Any, where: str) -> str | None:
    """A text, or None for null."""
    return None if value is None else text(value, where)


def one_of(value: Any, where: str, known: Collection[str]) -> str:
    """One of the known texts."""
    if not isinstance(value, str) or value not in known:
        raise wrong(where, f"expected one of {', '.join(known)}, got {brief(value)}")
    return value


def flag(value: Any, where: str) -> bool:
    """A boolean; null is false."""
    if value is not None and not isinstance(value, bool):
        raise wrong(where, f"expected true or false, got {brief(value)}")
    return bool(value)


def items(value: Any, where: str) -> list[Any]:
    """A list; null is an empty one."""
    if value is not None and not isinstance(value, list):
        raise wrong(where, f"expected a list, got {brief(value)}")
    if value is not None and len(value) > MAX_ITEMS:
        raise wrong(where, f"expected at most {MAX_ITEMS} entries, got {len(value)}")
    return value or []


def mapping(value: Any, where: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise wrong(where, f"expected an object, got {brief(value)}")
    return value


def optional_mapping(value: Any, where: str) -> dict[str, Any]:
    """An object; null is an empty one."""
    return {} if value is None else mapping(value, where)


def whole(value: Any, where: str, low: int, high: int) -> int | None:
    """A whole number within bounds, or None for null."""
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise wrong(where, f"expected a whole number from {low} to {high}, got {brief(value)}")
    return value


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds."""
    try:
        result = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise wrong(where, f"expected a finite number, got {brief(value)}")
    if not low <= result <= high:
        raise wrong(where, f"expected a number from {low:g} to {high:g}, got {brief(value)}")
    return result
