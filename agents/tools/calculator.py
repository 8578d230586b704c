"""Arithmetic from text, safely: the calculator's inside. Nothing is executed; a parsed expression
is walked, sizes bounded."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_LENGTH = 400  # characters of an expression
MAX_BITS = 4096  # of a whole number on the way


def _power(base: int | float, exponent: int | float) -> Any:
    if (
        isinstance(base, int)
        and isinstance(exponent, int)
        and base.bit_length() * exponent > MAX_BITS
    ):
        raise ValueError("the power is too large")  # before it is worked out
    return base**exponent


def _round(value: float, digits: int = 0) -> int | float:
    if not -20 <= digits <= 20:
        raise ValueError("round: expected -20 to 20 digits")
    return round(value, digits) if digits else round(value)


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES = {"pi": math.pi, "e": math.e}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
    "sqrt": math.sqrt,
    "floor": math.floor,
    "ceil": math.ceil,
    "log": math.log,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression: whole numbers in full, others to 15 digits.

    Raises `ValueError` (in words for the model) if it is not arithmetic, too long, too large
    or not a real number; `ZeroDivisionError` and `OverflowError` as Python does.
    """
    text = expression.strip().translate(_SIGNS)
    if not 0 < len(text) <= MAX_LENGTH:
        raise ValueError(f"expected an expression of 1 to {MAX_LENGTH} characters, got {len(text)}")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("this is not an arithmetic expression") from error
    value = _value(tree.body)
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        return _bounded(_BINARY[type(node.op)](left, right))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _bounded(_FUNCTIONS[node.func.id](*map(_value, node.args)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor):
        raise ValueError("write powers with **, not ^")
    raise ValueError(
        "only numbers, + - * / // % **, brackets, "
        + ", ".join([*_NAMES, *_FUNCTIONS])
        + " are understood"
    )


def _bounded(value: Any) -> int | float:
    if not isinstance(value, (int, float)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError("the result is not a finite real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("a number on the way is too large")
    return value
