"""Selection: which candidates of an archive are the parents of the next one.

A rule takes the candidates that can be compared (`Search.pool`: at least one, in archive order) and
a generator, and returns the parents. The first candidate is the search's start. Rules with settings
are made by a function.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from .search import Candidate, Select

Pool = tuple[Candidate, ...]


def current(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
    """The candidate adopted last; the first of the pool if none was."""
    return (max(pool, key=lambda candidate: candidate.adopted),)


def best(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
    """The candidate with the highest mean score, the first of equal ones."""
    return (max(pool, key=lambda candidate: candidate.mean),)


def whole_archive(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
    """Every candidate (ADAS, arXiv:2408.08435)."""
    return pool


def soft_mixed(sample: int = 4, uniform: float = 0.2, sharpness: float = 0.4) -> Select:
    """One of the start and the best others, drawn by `soft_mixed_probabilities` of their scores in
    percent (AFlow, arXiv:2410.10762).

    Args:
        sample: how many candidates take part, the start included.
        uniform, sharpness: lambda and alpha; the defaults are the paper's, its code has 0.3 and
            0.2.
    """
    if sample < 1:
        raise ValueError(f"sample: expected at least 1, got {sample}")

    def select(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
        among = start_and_best(pool, sample)
        chances = soft_mixed_probabilities([100 * c.mean for c in among], uniform, sharpness)
        return (rng.choices(among, chances)[0],)

    return select


def start_and_best(pool: Pool, sample: int) -> list[Candidate]:
    """The first candidate and the best of the others, `sample` in all, best first; of equal ones
    the earlier first."""

    def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: -candidate.mean)

    return ranked([pool[0], *ranked(pool[1:])[: sample - 1]])


def soft_mixed_probabilities(
    scores: Sequence[float], uniform: float, sharpness: float
) -> list[float]:
    """P(i) = lambda / n + (1 - lambda) exp(alpha (s_i - s_max)) / sum_j exp(alpha (s_j - s_max)),
    with scores s [n] in percent (AFlow, arXiv:2410.10762, equation 3).

    Raises `ValueError` unless 0 <= lambda (`uniform`) <= 1 and alpha (`sharpness`) >= 0.
    """
    if not 0 <= uniform <= 1 or sharpness < 0:
        raise ValueError(
            f"expected uniform from 0 to 1 and sharpness from 0, got {uniform} and {sharpness}"
        )
    top = max(scores)
    powers = [math.exp(sharpness * (score - top)) for score in scores]
    total = math.fsum(powers)
    return [uniform / len(scores) + (1 - uniform) * power / total for power in powers]


def gumbel_top(
    count: int = 3, kept: int = 5, temperature: float = 0.6, noise: float = 0.4
) -> Select:
    """`count` of the last `kept` candidates, by `gumbel_order` of their mean scores (TSGD-M,
    arXiv:2506.00400; the defaults are those of its code)."""

    def select(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
        last = pool[-kept:]
        draws = [rng.random() for _ in last]
        order = gumbel_order([c.mean for c in last], draws, temperature, noise)
        return tuple(last[place] for place in order[:count])

    return select


def gumbel_order(
    scores: Sequence[float], draws: Sequence[float], temperature: float, noise: float
) -> list[int]:
    """Places of the scores s [n], largest key first: s / temperature - noise log(-log u), with
    `draws` u [n] from between 0 and 1, so that the second part is Gumbel noise."""
    keys = [
        score / temperature - noise * math.log(-math.log(min(max(draw, 1e-12), 1 - 1e-12)))
        for score, draw in zip(scores, draws, strict=True)
    ]
    return sorted(range(len(keys)), key=lambda place: -keys[place])


def pareto(pool: Pool, rng: random.Random) -> tuple[Candidate, ...]:
    """One of the candidates that are best on some task, drawn in proportion to the number of such
    tasks (GEPA, arXiv:2507.19457, algorithm 2)."""
    wins = pareto_wins(pool)
    by_id = {candidate.id: candidate for candidate in pool}
    return (by_id[rng.choices(list(wins), list(wins.values()))[0]],)


def pareto_wins(pool: Pool) -> dict[str, int]:
    """By id of a candidate that no other makes superfluous: the number of tasks on which it is
    among the best.

    As in GEPA's code a candidate is superfluous if on each task where it is among the best another
    one that was kept is so too; the one with the lowest mean goes first, of equal ones the earlier.
    """
    fronts = _fronts(pool)
    kept = Counter(id for front in fronts.values() for id in front)
    for candidate in sorted(pool, key=lambda candidate: candidate.mean):
        own = [front for front in fronts.values() if candidate.id in front]
        if own and all(any(id != candidate.id and id in kept for id in front) for front in own):
            del kept[candidate.id]
    return dict(kept)


def _fronts(pool: Pool) -> Mapping[str, list[str]]:
    """By task: the ids of the candidates with the highest score on it."""
    fronts: dict[str, list[str]] = {}
    for task in dict.fromkeys(task for candidate in pool for task in candidate.scores):
        scored = [c for c in pool if task in c.scores]
        top = max(c.scores[task] for c in scored)
        fronts[task] = [c.id for c in scored if c.scores[task] == top]
    return fronts
