"""Bounds of the values that leave a workflow program: its answer, and the arguments of its calls.

A value that shares parts is small where the program runs and grows when it is unfolded. So every
value is counted twice, part by part and with one budget: by `prelude`, inside the interpreter that
runs the program, before it leaves; and by `plain_value`, in the calling process, which trusts no
value of a program.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from typing import Any

from ...agents.programs.restrictions import parsed

ITEMS, CHARS = 100_000, 1 << 20  # parts and characters of one value
DIGITS, DEPTH = 4000, 20  # of one number; nesting of one value
_LARGE = 10**DIGITS  # above 4300 digits Python writes no number
_LINE = re.compile(rb"\r\n|\r|\n")
_REFUSED = "cannot come out of a program"
_KINDS = "None, bool, int, float, str, list, tuple and dict can"

# Run in the interpreter before the program. Builtins are parameters, so that a program that binds
# their names anew changes nothing here.
_PRELUDE = f"""
def MARK_bounds(type, len, str, int, list, tuple, dict, ValueError, plain):
    large = 10 ** {DIGITS}
    def count(value, left, depth):
        kind = type(value)
        left[0] -= 1
        if kind is str:
            left[1] -= len(value)
        elif kind is int:
            if not -large < value < large:
                raise ValueError("a number of more than {DIGITS} digits {_REFUSED}")
        elif kind is list or kind is tuple or kind is dict:
            if not depth:
                raise ValueError("a value nested more than {DEPTH} deep {_REFUSED}")
            left[0] -= len(value)
            if left[0] >= 0:
                left[0] += len(value)
                for part in value:
                    count(part, left, depth - 1)
                    if kind is dict:
                        count(value[part], left, depth - 1)
        elif kind not in plain:
            raise ValueError("a " + kind.__name__ + " {_REFUSED}: {_KINDS}")
        if left[0] < 0:
            raise ValueError("a value of more than {ITEMS} parts {_REFUSED}")
        if left[1] < 0:
            raise ValueError("a value of more than {CHARS} characters {_REFUSED}")
    def out(value):
        count(value, [{ITEMS}, {CHARS}], {DEPTH})
        return value
    def guarded(name, call):
        def external(*args, **kwargs):
            try:
                out([list(args), kwargs])
            except ValueError as error:
                raise ValueError(name + ": " + str(error))
            return call(*args, **kwargs)
        return external
    return out, guarded
async def MARK_later(): pass
MARK_plain = (type(None), bool, float, type(MARK_later), type(MARK_later()))
MARK_out, MARK_guarded = MARK_bounds(type, len, str, int, list, tuple, dict, ValueError, MARK_plain)
"""


class BadValue(Exception):
    """A value that may not leave a program."""


def prelude(mark: str, names: Collection[str]) -> str:
    """Monty code that defines each external `NAME` as a guard before `MARK_NAME`, and `MARK_out`.

    `mark`: begins the names that a program must not know.
    """
    guards = "".join(
        f"{name} = {mark}_guarded({name!r}, {mark}_{name})\n{mark}_{name} = None\n"
        for name in names
    )
    return f"{_PRELUDE.replace('MARK', mark)}{guards}None"


def answering(program: str, mark: str) -> str:
    """The program with its last expression, its answer, counted. Raises `SyntaxError`."""
    body = parsed(program).body
    if not body or not isinstance(body[-1], ast.Expr):
        return program
    last, text = body[-1], program.encode()
    starts = [0, *(match.end() for match in _LINE.finditer(text))]
    start = starts[last.lineno - 1] + last.col_offset
    end = starts[(last.end_lineno or 0) - 1] + (last.end_col_offset or 0)
    return (text[:start] + f"{mark}_out((".encode() + text[start:end] + b"))" + text[end:]).decode()


def plain_value(value: Any) -> Any:
    """A value of a program, of exact builtin types. Raises `BadValue`."""
    return _Count().plain(value, DEPTH)


class _Count:
    """The rest of the budget of one value."""

    def __init__(self) -> None:
        self.items, self.chars = ITEMS, CHARS

    def plain(self, value: Any, depth: int) -> Any:
        kind = type(value)
        self._take(1, 0)
        if kind is str:
            self._take(0, len(value))
            return value
        if kind is int:
            if not -_LARGE < value < _LARGE:
                raise BadValue(f"a number of more than {DIGITS} digits {_REFUSED}")
            return value
        if value is None or kind in (bool, float):
            return value
        if kind not in (list, tuple, dict):
            raise BadValue(f"a {kind.__name__[:60]} {_REFUSED}: {_KINDS}")
        if not depth:
            raise BadValue(f"a value nested more than {DEPTH} deep {_REFUSED}")
        if len(value) > self.items:
            self._take(len(value), 0)
        if kind is dict:
            return {
                self.plain(key, depth - 1): self.plain(item, depth - 1)
                for key, item in value.items()
            }
        return kind([self.plain(item, depth - 1) for item in value])

    def _take(self, items: int, chars: int) -> None:
        self.items, self.chars = self.items - items, self.chars - chars
        if self.items < 0:
            raise BadValue(f"a value of more than {ITEMS} parts {_REFUSED}")
        if self.chars < 0:
            raise BadValue(f"a value of more than {CHARS} characters {_REFUSED}")
