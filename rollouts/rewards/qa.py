"""Exact match and F1 of HotpotQA and DROP, as their own evaluation scripts compute them.

HotpotQA's compares bags of words, yes and no only as a whole. DROP's pairs spans one to one, and
where the answer is a number, another number is worth nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ...agents.types import Task
from .scoring import is_missing

Scores = tuple[float, float]  # exact match, F1

# characters of an answer; a longer one scores 0, and would take long to compare
MAX_ANSWER = 20_000
MAX_NUMBER = 100  # characters of a number


def scores(answer: str, task: Task) -> Scores:
    """(exact match, F1) of a text, the better of all right answers. Raises `ValueError` for a task
    without one."""
    several = task.answer if isinstance(task.answer, (list, tuple)) else [task.answer]
    answers = [gold for gold in several if not is_missing(gold)]
    if not answers:
        raise ValueError(f"task {task.id!r} has no answer to compare with")
    if len(answer) > MAX_ANSWER:
        return 0.0, 0.0
    if task.meta.get("_scorer") == "drop":
        parts = [part for part in answer.split("|") if part.strip()]
        pairs = [drop_scores(parts, [str(span) for span in spans]) for spans in answers]
    else:
        pairs = [hotpot_scores(answer, str(gold)) for gold in answers]
    return max(em for em, _ in pairs), max(f1 for _, f1 in pairs)


def hotpot_scores(answer: str, gold: str) -> Scores:
    """SQuAD's exact match and F1 over bags of words, without articles, punctuation and case; yes,
    no and noanswer only match whole."""
    ours, theirs = (_words(text) for text in (answer, gold))
    whole = ours == theirs
    if not whole and any(words in (["yes"], ["no"], ["noanswer"]) for words in (ours, theirs)):
        return 0.0, 0.0
    common = sum((Counter(ours) & Counter(theirs)).values())
    return float(whole), (
        float(whole) if not ours or not theirs else 2 * common / (len(ours) + len(theirs))
    )


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def drop_scores(answer: Sequence[str], gold: Sequence[str]) -> Scores:
    """DROP's exact match and F1: spans as sets of words, paired one to one so that the sum is
    largest, over the larger number of spans."""
    ours, theirs = ([_bag(span) for span in spans] for spans in (answer, gold))
    if not ours or not theirs:
        return 0.0, 0.0
    whole = len(ours) == len(theirs) and {text for text, _ in ours} == {text for text, _ in theirs}
    table = [[_overlap(mine, bag) for _, mine in ours] for _, bag in theirs]
    return float(whole), best_pairing(table) / max(len(ours), len(theirs))


def _bag(span: str) -> tuple[str, frozenset[str]]:
    """A span as DROP compares it: its text, and its words; every number in one spelling (`2.0`, `2`
    and `02` are one)."""
    words = [word for each in re.split(r"[ \-]", span.lower()) for word in _drop_word(each).split()]
    return " ".join(words), frozenset(words)


def _drop_word(word: str) -> str:
    if _number(word) is None:
        word = "".join(c for c in word if c not in string.punctuation)
    value = _number(word)
    return re.sub(r"\b(a|an|the)\b", " ", word) if value is None else str(value)


def _number(word: str) -> float | None:
    return (
        float(word)
        if len(word) <= MAX_NUMBER and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", word)
        else None
    )


def _overlap(ours: frozenset[str], theirs: frozenset[str]) -> float:
    numbers = {word for word in theirs if _number(word) is not None}
    if numbers and not numbers & ours:
        return 0.0
    return (
        2 * len(ours & theirs) / (len(ours) + len(theirs))
        if ours and theirs
        else float(ours == theirs)
    )


def best_pairing(table: Sequence[Sequence[float]]) -> float:
    """The largest sum of entries with at most one in each row and column (Kuhn and Munkres, by
    shortest augmenting paths)."""
    if len(table) > len(table[0]):
        return best_pairing(list(zip(*table, strict=True)))
    rows, columns = len(table), len(table[0])
    price_row, price_column, row_of = [0.0] * (rows + 1), [0.0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        row_of[0], at = row, 0
        least, before, done = (
            [float("inf")] * (columns + 1),
            [0] * (columns + 1),
            [False] * (columns + 1),
        )
        while row_of[at]:
            done[at], here, gap, following = True, row_of[at], float("inf"), 0
            for column in range(1, columns + 1):
                if not done[column]:
                    cost = -table[here - 1][column - 1] - price_row[here] - price_column[column]
                    if cost < least[column]:
                        least[column], before[column] = cost, at
                    if least[column] < gap:
                        gap, following = least[column], column
            for column in range(columns + 1):
                if done[column]:
                    price_row[row_of[column]] += gap
                    price_column[column] -= gap
                else:
                    least[column] -= gap
            at = following
        while at:
            row_of[at], at = row_of[before[at]], before[at]
    return sum(table[row_of[c] - 1][c - 1] for c in range(1, columns + 1) if row_of[c])
