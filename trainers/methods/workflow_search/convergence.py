"""Rules of a search over programs: when it has converged, and on which tasks it compares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def converged(means: Sequence[float], top: int = 3, rounds: int = 5) -> tuple[int, int] | None:
    """(first, last) of the `rounds` successive rounds in which the mean of the `top` best means so
    far did not change; None if there are none (AFlow's code with z = 0).

    Rounds are numbered from 0; up to `top` of them nothing is decided.
    """
    if len(means) <= top:
        return None
    unchanged, before = 0, math.nan
    for last in range(len(means)):
        best = sorted(means[: last + 1], reverse=True)[:top]
        now = math.fsum(best) / len(best)
        unchanged = unchanged + 1 if now == before else 0
        if unchanged >= rounds:
            return last - rounds + 1, last
        before = now
    return None


def most_varied(scores: Mapping[str, Sequence[float]], count: int) -> list[str]:
    """The `count` tasks whose scores vary most over several plays of one program, in their own
    order; of equal variance the first."""

    def variance(values: Sequence[float]) -> float:
        mean = math.fsum(values) / len(values)
        return math.fsum((value - mean) ** 2 for value in values) / len(values)

    ranked = sorted(scores, key=lambda task: -variance(scores[task]))
    chosen = set(ranked[:count])
    return [task for task in scores if task in chosen]
