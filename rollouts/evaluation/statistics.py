"""Statistics of evaluations: intervals, estimators over samples, paired tests, correction for many
comparisons.

Pure Python. The unit is the task: several samples of one task are averaged before anything is
tested, so that many samples of few tasks do not pass for many tasks.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.text.answers import majority, normalise
from ...agents.types import SettingError

EXACT = 16  # up to so many differences every sign pattern is tried
DRAWS = 20_000  # sign patterns drawn beyond that


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, from `right` of `samples`: 1 - C(n-c, k) /
    C(n, k) (arXiv:2107.03374, eq. 1)."""
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(
            f"pass@{k} of {right} right among {samples}: expected 1 <= k <= samples and 0 <= right"
            " <= samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(
    outputs: Sequence[str | None], scores: Sequence[float], k: int, seed: int = 0
) -> float:
    """Mean score of the answer that most of k samples give, over the disjoint blocks of k; a rest
    shorter than k is left out.

    Votes are read as `agents.text.answers.majority` does, ties are drawn from `seed`. The winner
    scores what the first sample that voted for it scores; a block without any answer scores 0.
    """
    if not 1 <= k <= len(outputs):
        raise ValueError(f"majority@{k} of {len(outputs)} samples: expected 1 <= k <= samples")
    rng, values = random.Random(seed), []
    for start in range(0, len(outputs) - k + 1, k):
        block = outputs[start : start + k]
        winner = majority(block, rng)
        votes = (
            n
            for n in range(k)
            if winner and normalise(majority([block[n]], rng)) == normalise(winner)
        )
        first = next(votes, None)
        values.append(0.0 if first is None else scores[start + first])
    return sum(values) / len(values)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a paired difference: how often random signs give a mean at least as far
    from 0.

    Differences of one size (right against wrong) have a closed form, the exact sign test, which is
    McNemar's. Few others are enumerated; for many, `DRAWS` patterns are drawn from `seed` and the
    observed one counts as one of them.
    """
    moved = [d for d in differences if d]
    if not moved:
        return 1.0
    if len({abs(d) for d in moved}) == 1:
        n, ahead = len(moved), sum(d > 0 for d in moved)
        tail = sum(math.comb(n, i) for i in range(min(ahead, n - ahead) + 1)) / 2**n
        return min(1.0, 2 * tail)
    observed = abs(math.fsum(moved)) - 1e-12
    if len(moved) <= EXACT:
        patterns = itertools.product((1, -1), repeat=len(moved))
        return sum(
            abs(math.fsum(s * d for s, d in zip(p, moved, strict=True))) >= observed
            for p in patterns
        ) / 2 ** len(moved)
    rng, far = random.Random(seed), 1
    for _ in range(DRAWS):
        signs = rng.getrandbits(len(moved))
        far += abs(math.fsum(d if signs >> i & 1 else -d for i, d in enumerate(moved))) >= observed
    return far / (DRAWS + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: the chance of any false claim among all of them stays below the level
    (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; NaN of none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval of a share of `count` trials (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(scores: Sequence[float], z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's if all scores are 0 or 1, else the normal one, from their
    spread."""
    count, mean = len(scores), sum(scores) / len(scores)
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(mean, count, z)
    half = z * math.sqrt(sum((s - mean) ** 2 for s in scores) / max(count - 1, 1) / count)
    return mean - half, mean + half


def paired(before: Evaluation, after: Evaluation, z: float = 1.959964) -> dict[str, Any]:
    """Mean difference after - before over the same tasks, with its 95 % interval (normal, from the
    spread of the differences)."""
    if set(before.scores) != set(after.scores):
        raise SettingError(
            "paired: the two evaluations hold different tasks; evaluate both on one task set"
        )
    differences = [after.scores[task] - before.scores[task] for task in before.scores]
    n, mean = len(differences), sum(differences) / len(differences)
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1))
    half = z * spread / math.sqrt(n)
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {"difference": mean, "ci95": [mean - half, mean + half], "gained": gained, "lost": lost}


@dataclass(frozen=True)
class Evaluation:
    """Scores by task id (a failed or unscorable episode counts 0 and is counted in `failed`).

    `left`: tasks that were not played, since the bound that was asked for could not be reached any
    more; each counts 0.
    """

    scores: Mapping[str, float]
    failed: int = 0
    errors: tuple[str, ...] = ()
    tokens: int = 0
    left: int = 0

    @property
    def accuracy(self) -> float:
        return sum(self.scores.values()) / (len(self.scores) + self.left)

    def summary(self) -> dict[str, Any]:
        low, high = interval(list(self.scores.values()))
        return {
            "accuracy": self.accuracy,
            "ci95": [low, high],
            "num_tasks": len(self.scores),
            "failed": self.failed,
        }
