"""Answers in texts: extraction, normalisation, comparison and the majority vote.

Quick and of the standard library only, for use inside a team. Mathematical equivalence (`2*x` and
`x+x`) is decided by rewards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from fractions import Fraction

from ..types import Turn

_TAIL = 20_000  # characters from the end that are looked at: a text may be a megabyte
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]])[-−])?(?<![\w.])(?:{_NUMBER})(?:[eE][+-]?\d+)?(?:/\d+)?"
)
_AFTER_ANSWER = re.compile(
    r"(?:\banswer\b[*_\s]*(?::|=|\bis\b:?)|^[^\S\n]*####)[*_\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_VALUE = re.compile(r"([-+]?)(\d+(?:\.\d*)?|\.\d+)(?:e([-+]?\d{1,2}))?(?:/(\d+))?%?")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|fbox)\{([^{}]*)\}")
_NOISE = re.compile(r"\\[,;!: ]|\\left|\\right|\\\(|\\\)|\\\[|\\\]|\\?\$|[*`\"]|\^\\circ|°")


def extract(text: str) -> str | None:
    r"""The answer a text gives: in its last `\boxed{...}`, else after its last "Answer:" ("the
    answer is", "####"), else its last number. None if it gives none. At most the last 20000
    characters are read.
    """
    text = text[-_TAIL:]
    boxed = _boxed(text)
    if boxed:
        return boxed
    phrases = [_trim(match[1]) for match in _AFTER_ANSWER.finditer(text)]
    if phrases and phrases[-1]:
        return phrases[-1]
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def normalise(answer: str) -> str:
    r"""One spelling for answers that look alike: numbers as reduced fractions (`1,000.50` is
    `2001/2`, `50%` is `50`), LaTeX wrappers, signs of money, case, spaces around operators and a
    last full stop dropped.
    """
    text = answer[:_TAIL].replace("−", "-")
    for pattern, put in ((_WRAPPER, r"\1"), (_FRACTION, r"\1/\2"), (_NOISE, "")):
        text = pattern.sub(put, text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".,;!").casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r" ?([-+*/=<>^(),]) ?", r"\1", text)
    value = _VALUE.fullmatch(text) if len(text) <= 100 else None
    if value is None or (value[4] and int(value[4]) == 0):
        return text
    number = Fraction(value[2]) * Fraction(10) ** int(value[3] or 0) / int(value[4] or 1)
    return str(-number if value[1] == "-" else number)


def same(a: str | None, b: str | None) -> bool:
    """True if both answers are given and read the same. No answer is the same as nothing, not even
    as another missing one."""
    return a is not None and b is not None and normalise(a) == normalise(b)


def vote(draft: Turn | str | None) -> str | None:
    """The answer a draft votes for: what `extract` finds in it, or the whole draft if that is one
    to three words ("New York")."""
    text = "" if draft is None else str(draft).strip()
    return extract(text) or (text if 0 < len(text.split(maxsplit=4)) <= 3 else None)


def stands_in(text: str, whole: str) -> bool:
    """Whether `whole` holds all of `text`, but for white space around it, and not as a part of a
    longer word or number."""
    text = text.strip()
    return (
        text in whole
        and bool(text)
        and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", whole) is not None
    )


def majority(drafts: Iterable[Turn | str | None], rng: random.Random) -> str:
    """The answer most drafts give, as the first of them spelt it; "" if there is none.

    A draft's vote is what `vote` says; drafts without an answer do not vote. Answers are counted as
    `normalise` spells them. **Ties:** among the most frequent answers, in their order of first
    appearance, one is drawn by `rng` with equal chances; with `team.rng` the episode's seed fixes
    which.
    """
    votes: dict[str, list[str]] = {}
    for draft in drafts:
        answer = vote(draft)
        if answer:
            votes.setdefault(normalise(answer), []).append(answer)
    if not votes:
        return ""
    most = max(map(len, votes.values()))
    tied = [answers[0] for answers in votes.values() if len(answers) == most]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def _boxed(text: str) -> str | None:
    """What the last complete, non-empty box holds. Few tries: a text can be nothing but opening
    boxes."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in starts[:-9:-1]:
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                if inner := text[start:at].strip():
                    return inner
                break
    return None


def _trim(text: str) -> str:
    """A phrase without the rest of its line's prose and marks around it."""
    sentence = re.split(r"[.!?;](?:\s|$)", text, maxsplit=1)[0]
    return sentence.strip().strip("*_`\"' ").strip()
