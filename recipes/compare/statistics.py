"""Statistics of a comparison: means over tasks and seeds with intervals that cover both, paired
tests, and the effect that a number of tasks can show.

Tasks and seeds are crossed: every seed's state is scored on the tasks. The error of the mean of a
table of S seeds and T tasks is taken as

    se^2 = s_tasks^2 / T + s_seeds^2 / S

with the spreads of the means of tasks and of the means of seeds. Under random effects of task, seed
and both this is at least the variance of the mean (the effect of both is counted twice), so
intervals are a little too wide rather than too narrow. With one seed it is the error over tasks,
and nothing is said about other seeds. Quantiles are Student's, with the degrees of freedom of
Welch and Satterthwaite: with three seeds that differ much, intervals are wide.

Where (nearly) nothing varies, spreads say that nothing can: of scores from 0 to 1 an interval
reaches at least z^2 / (T + z^2) to both sides, which is the upper end of Wilson's (1927) for 0 of
T, and of Tango's (1998) for paired shares where no task differs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance
from typing import Any

from marlora.agents.types import SettingError
from marlora.rollouts.evaluation.statistics import holm, interval, sign_flip_p

from .measured import Scores

LEVEL = 0.05
POWER = 0.8
Table = Mapping[int, Scores]  # scores, or differences, by seed and task


def over_seeds(table: Table) -> Scores:
    """Each task's mean over the seeds that played it."""
    values: dict[str, list[float]] = {}
    for scores in table.values():
        for task, score in scores.items():
            values.setdefault(task, []).append(score)
    return {task: fmean(own) for task, own in values.items()}


def by_seed(table: Table) -> dict[int, float]:
    """Each seed's mean over its tasks."""
    return {seed: fmean(scores.values()) for seed, scores in table.items()}


def mean(table: Table) -> float:
    """The mean over tasks of their means over seeds."""
    return fmean(over_seeds(table).values())


def standard_error(table: Table) -> tuple[float, float]:
    """The error of the mean, and its degrees of freedom (see the head of this file)."""
    parts = [
        (variance(values) / len(values), len(values) - 1)
        for values in (list(over_seeds(table).values()), list(by_seed(table).values()))
        if len(values) > 1
    ]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0, math.inf
    return math.sqrt(total), total**2 / sum(part**2 / freedom for part, freedom in parts)


def mean_interval(table: Table) -> tuple[float, float]:
    """95 % interval of the mean of scores: of one seed over tasks as evaluations have it (Wilson's
    for scores of 0 and 1), of several over tasks and seeds, and at least as wide: tasks that are
    all right with every seed have no spread, and still are a sample."""
    scores = list(over_seeds(table).values())
    low, high = interval(scores)
    if len(table) > 1:
        both = around(mean(table), *standard_error(table))
        low, high = min(low, both[0]), max(high, both[1])
    if not are_shares(scores):
        return low, high
    if not all(score in (0.0, 1.0) for score in scores):  # of which Wilson's is honest already
        least = least_half_width(len(scores))
        low, high = min(low, mean(table) - least), max(high, mean(table) + least)
    return max(low, 0.0), min(high, 1.0)


def are_shares(scores: Iterable[float]) -> bool:
    """Whether scores are from 0 to 1."""
    return all(0.0 <= score <= 1.0 for score in scores)


def least_half_width(tasks: int) -> float:
    """How far a 95 % interval of shares over so many tasks reaches at least: see the head of this
    file."""
    z = NormalDist().inv_cdf(1 - LEVEL / 2)
    return z * z / (tasks + z * z)


def around(middle: float, error: float, freedom: float) -> tuple[float, float]:
    """The 95 % interval of a mean with this error."""
    half = student_quantile(1 - LEVEL / 2, freedom) * error if error else 0.0
    return middle - half, middle + half


def student_tail(t: float, freedom: float) -> float:
    """P(|T| >= t) of Student's distribution: twice the integral of its density beyond t.

    With x = sqrt(freedom) tan(a) the density becomes cos(a)^(freedom - 1) on a finite range, which
    Simpson's rule integrates.
    """
    if math.isinf(freedom) or freedom > 1e5:
        return 2 * NormalDist().cdf(-abs(t))
    start, steps = math.atan(abs(t) / math.sqrt(freedom)), 400
    end = min(math.pi / 2, start + 15 / math.sqrt(freedom))  # what lies beyond is below 1e-40
    width = (end - start) / steps
    total = sum(
        (1 if n in (0, steps) else 4 if n % 2 else 2)
        * max(math.cos(start + n * width), 0.0) ** (freedom - 1)
        for n in range(steps + 1)
    )
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return min(1.0, 2 * scale / math.sqrt(math.pi) * total * width / 3)


@functools.lru_cache(256)
def student_quantile(share: float, freedom: float) -> float:
    """The value that Student's distribution does not exceed in this share (above one half)."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if student_tail(middle, freedom) > 2 * (1 - share) else (low, middle)
        )
    return high


# differences


@dataclass(frozen=True)
class Pair:
    """Two rows to compare: `first` is subtracted from `second`. shares: whether all scores of both
    are from 0 to 1."""

    first: str
    second: str
    differences: Table
    shares: bool = True


def pair(first: str, second: str, before: Table, after: Table) -> Pair:
    """The paired differences of an arm to a reference, which has one seed that every seed of the
    arm is compared with, on the tasks that both were scored on.

    Raises `SettingError` if they share no task.
    """
    scores = over_seeds(before)
    return _pair(first, second, before, after, {seed: scores for seed in after})


def pair_by_seed(first: str, second: str, before: Table, after: Table) -> Pair | None:
    """The paired differences of two arms, each seed with the same seed's; None if they share no
    seed. A seed that only one of them has counts nothing: a control of one seed says nothing of
    how its others would have come out."""
    return _pair(first, second, before, after, before) if before.keys() & after.keys() else None


def _pair(first: str, second: str, before: Table, after: Table, beside: Table) -> Pair:
    """Differences of the rows of `after` to those that `beside` has for their seeds."""
    differences: dict[int, Scores] = {}
    for seed, scores in after.items():
        other = beside.get(seed, {})
        own = {task: score - other[task] for task, score in scores.items() if task in other}
        if own:
            differences[seed] = own
    if not differences:
        raise SettingError(f"compare: {first!r} and {second!r} were scored on different tasks")
    known = (score for table in (before, after) for own in table.values() for score in own.values())
    return Pair(first, second, differences, are_shares(known))


def tested(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """For each pair the mean difference with its 95 % interval, the tasks gained and lost, the
    p-value, and the one corrected for the number of pairs (Holm 1979).

    The p-value is the larger one of two: signs of tasks flipped (exact for one seed), and Student's
    over tasks and seeds.
    """
    rows: list[dict[str, Any]] = []
    for each in pairs:
        tasks, middle = over_seeds(each.differences), mean(each.differences)
        error, freedom = standard_error(each.differences)
        p = sign_flip_p(list(tasks.values()))
        if len(each.differences) > 1 and error:
            p = max(p, student_tail(middle / error, freedom))
        low, high = around(middle, error, freedom)
        if each.shares:
            least = least_half_width(len(tasks))
            low, high = max(-1.0, min(low, middle - least)), min(1.0, max(high, middle + least))
        rows.append(
            {
                "from": each.first,
                "to": each.second,
                "difference": middle,
                "ci95": [low, high],
                "num_tasks": len(tasks),
                "gained": sum(d > 0 for d in tasks.values()),
                "lost": sum(d < 0 for d in tasks.values()),
                "by_seed": {str(s): d for s, d in by_seed(each.differences).items()},
                "p": p,
            }
        )
    corrected = holm({str(n): row["p"] for n, row in enumerate(rows)})
    return [{**row, "p_holm": corrected[str(n)]} for n, row in enumerate(rows)]


def share_below(pair: Pair) -> float:
    """Share of seeds whose mean is below that of the row it is compared with."""
    means = by_seed(pair.differences).values()
    return sum(value < 0 for value in means) / len(means)


# what can be shown


def detectable(spread: float, tasks: int, comparisons: int) -> float:
    """The smallest mean difference that a paired test on so many tasks shows in 80 % of trials.

    With q = z(1 - level / 2 m) + z(power) it is the larger of q spread / sqrt(tasks), and of
    q^2 / (tasks + q^2): a gain d on tasks that are right or wrong spreads differences by
    sqrt(d (1 - d)) itself, also where the same state always answers the same.

    Args:
        spread: standard deviation of a task's difference between two plays of one state.
        comparisons: m, by which Holm's first step divides the level of 5 %.
    """
    normal = NormalDist()
    q = normal.inv_cdf(1 - LEVEL / (2 * comparisons)) + normal.inv_cdf(POWER)
    return max(q * spread / math.sqrt(tasks), q**2 / (tasks + q**2))


def spread_of_repeats(plays: Sequence[Scores]) -> float:
    """Standard deviation of a task's difference between two plays of one state: sqrt(2) times that
    of a task's score within plays, pooled over tasks."""
    within = fmean(variance([play[task] for play in plays]) for task in plays[0])
    return math.sqrt(2 * within)


def repeats(plays: Sequence[Scores]) -> dict[str, Any]:
    """The noise floor of one state measured again and again: the means, their standard deviation,
    and the largest difference between two of them."""
    means = [fmean(play.values()) for play in plays]
    return {
        "means": means,
        "sd": math.sqrt(variance(means)),
        "largest_difference": max(means) - min(means),
    }
