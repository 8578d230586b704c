"""What an answer of a debate is worth by its influence: MAPoRL's reward and shaping bonus
(arXiv:2502.18439). Pure Python.

A `Table` has one mapping per round that was played, from member to a number: a verifier's score, or
1 for right and 0 for wrong. What was not played (an early stop) is not in it, so nothing needs a
sentinel, and every sum is normalised by what was played.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

Table = Sequence[Mapping[str, float]]
HORIZONS, SHARES = ("discounted_sum", "last", "current"), ("all", "individual")
SIGNS = ("none", "paper_sign", "code_sign")

_PIECE = re.compile(r"\w+|[^\w\s]")
_PATTERN, _REPEATS = (
    20,
    3,
)  # words and signs of the longest pattern, how often it may stand in a row


def influence(
    scores: Table,
    *,
    horizon: str = "discounted_sum",
    share: str = "all",
    discount: float = 0.3,
    own: Table | None = None,
) -> list[dict[str, float]]:
    """R of every answer from the scores s of all, with T rounds and A members.

    `discounted_sum`: R[t][a] = (s[t][a] + sum over k > t of discount^(k-t) x f[k]) / (sum over k >=
    t of discount^(k-t)), where f[k] is the mean score of all members in round k (`all`, a's own
    included), or a's own (`individual`). `last`: f of the last round. `current`: f of the answer's
    own round.

    Args:
        own: what an answer itself counts in its own sum (`discounted_sum`, s[t][a] above), if that
            differs from what the others' sums take it for: a penalty that is not to be shared.
    """
    own = scores if own is None else own
    mean = [sum(row.values()) / len(row) for row in scores]

    def later(k: int, member: str) -> float:
        return mean[k] if share == "all" else scores[k][member]

    def reward(t: int, member: str) -> float:
        if horizon == "last":
            return later(len(scores) - 1, member)
        if horizon == "current":
            return mean[t] if share == "all" else own[t][member]
        weights = [discount ** (k - t) for k in range(t, len(scores))]
        ahead = sum(w * later(k, member) for k, w in enumerate(weights[1:], start=t + 1))
        return (own[t][member] + ahead) / sum(weights)

    return [{member: reward(t, member) for member in row} for t, row in enumerate(scores)]


def shaping(right: Table, weights: Sequence[float], sign: str) -> list[dict[str, float]]:
    """B of every answer from who was right when: a bonus for changing for the better and for
    changing others for the better.

    `paper_sign`, weights (alpha0, alpha1, beta0, beta1). Of round t > 0, if the member's own answer
    went

    - wrong -> right: +alpha0 against a wrong majority of the others (critical reasoning), +alpha1
      with a right one (persuaded);
    - right -> wrong: -alpha0 against a right majority, -alpha1 with a wrong one.

    Of every round but the last, if the others' majority went in the next

    - wrong -> right: +beta0 if the member was wrong (a useful mistake), +beta1 if it was right (it
      persuaded);
    - right -> wrong: -beta0 if it was right, -beta1 if it was wrong.

    `code_sign` is what the authors' code does: alpha0 and alpha1 change places, the bonus for
    influence has the other sign, and the first round has none. The others' majority is their mean
    against one half; a tie gives no bonus. A member alone is never persuaded.
    """
    if sign == "none":
        return [dict.fromkeys(row, 0.0) for row in right]
    alone, persuaded, mistake, persuader = weights
    if sign == "code_sign":
        alone, persuaded, mistake, persuader = persuaded, alone, -mistake, -persuader

    def others(t: int, member: str) -> int:
        rest = [value for name, value in right[t].items() if name != member]
        return _side(sum(rest) / len(rest)) if rest else 0

    def change(t: int, member: str) -> float:
        before, now = _side(right[t - 1][member]), _side(right[t][member])
        if before * now >= 0:
            return 0.0
        around = others(t - 1, member)
        if around == 0:
            return 0.0 if len(right[t]) > 1 else now * alone
        return now * (persuaded if around == now else alone)

    def effect(t: int, member: str) -> float:
        before, after, self_ = others(t, member), others(t + 1, member), _side(right[t][member])
        if before * after >= 0 or self_ == 0:
            return 0.0
        return after * (persuader if self_ == after else mistake)

    def bonus(t: int, member: str) -> float:
        influences = t + 1 < len(right) and not (t == 0 and sign == "code_sign")
        return (change(t, member) if t else 0.0) + (effect(t, member) if influences else 0.0)

    return [{member: bonus(t, member) for member in row} for t, row in enumerate(right)]


def _side(value: float) -> int:
    """1 above one half, -1 below, 0 at it."""
    return (value > 0.5) - (value < 0.5)


def invalid(text: str, *, min_words: int = 0, boxed: bool = False, repeats: int = _REPEATS) -> str:
    """Why an answer does not count; "" if it does: too short, a pattern in a row again and again,
    or no answer in a box.

    A pattern is one to twenty words and signs (numbers do not count as one), and may stand
    `repeats` times in a row (0: as often as it likes); the paper's code looks at tokens instead.
    """
    pieces = _PIECE.findall(text)
    if len(pieces) < min_words:
        return f"{len(pieces)} words and signs, at least {min_words} expected"
    for length in range(1, _PATTERN + 1 if repeats else 1):
        row = 0  # how many pieces in a row equal the one a pattern's length before
        for i in range(length, len(pieces)):
            row = row + 1 if pieces[i] == pieces[i - length] else 0
            if row >= length * repeats and not "".join(pieces[i - length + 1 : i + 1]).isdigit():
                return (
                    f"{' '.join(pieces[i - length + 1 : i + 1])!r} stands there more than {repeats}"
                    " times in a row"
                )
    if boxed and not re.search(r"\\boxed\s*\{\s*[^\s{}]", text):
        return "no answer in a box"
    return ""
