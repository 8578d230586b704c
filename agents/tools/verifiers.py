"""Verifiers: functions that give the chance that an answer is right, and the words for it.

A verifier sees what an agent may see: the public task and one answer, never the gold answer. So its
words may stand in the prompts of agents that are trained. The comparison with the gold answer is a
reward (`rollouts/rewards/builtin.py: right`), and no system can reach it.
"""

from __future__ import annotations

import inspect
import math
import re
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..lookup import check_name, load_function
from ..text.answers import extract, same
from ..types import Task
from .calculator import evaluate

# (public task, answer) -> chance from 0 to 1 that it is right
Verifier = Callable[[Task, str], "float | Awaitable[float]"]

LIMITS = (0.3, 0.6, 0.8)  # scores from which the next word holds
WORDS = ("almost certainly wrong", "doubtful", "plausible, but check it", "most likely right")

_EXPRESSION = re.compile(r"[\d(][\d\s()+*/.,×÷−-]*[\d)]")


def calculator(task: Task, text: str) -> float:
    """A verifier by rule for sums: 1 if the answer is what the longest arithmetic expression of the
    prompt comes to, else 0.

    Raises `ValueError` if the prompt holds no expression that can be worked out: the rule knows
    nothing then.
    """
    expression = max(_EXPRESSION.findall(task.prompt), key=len, default="")
    try:
        value = evaluate(expression.replace(",", "")) if expression else ""
    except (ValueError, ArithmeticError) as error:
        raise ValueError(
            f"task {task.id!r}: the calculator cannot work out {expression!r} ({error})"
        ) from error
    if not value:
        raise ValueError(
            f"task {task.id!r}: the prompt holds no arithmetic expression; the calculator cannot"
            " verify its answers"
        )
    return float(same(extract(text), value))


VERIFIERS: dict[str, Callable[..., Any]] = {"calculator": calculator}


def resolve_verifier(name: str) -> Verifier:
    """A verifier by name: `calculator`, `module:function`, or `module:maker(text)` such as a
    trained one and its folder."""
    return load_function("verifier", name, VERIFIERS)


def check_verifier(name: str) -> None:
    """Check the name of a verifier that is loaded later (see `lookup.check_name`)."""
    check_name("verifier", name, VERIFIERS)


async def verify(verifier: Verifier, task: Task, text: str) -> float:
    """The verifier's score of one answer. Raises `ValueError` unless it is a number from 0 to 1."""
    result = verifier(task.public(), text)
    score = float(await result if inspect.isawaitable(result) else result)
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise ValueError(
            f"verifier {getattr(verifier, '__name__', verifier)!r} gave {score} for an answer;"
            " expected 0 to 1"
        )
    return score


def in_words(score: float, words: Sequence[str] = WORDS) -> str:
    """One of four words: below 0.3, below 0.6, below 0.8, and from there on."""
    return words[bisect_right(LIMITS, score)]
