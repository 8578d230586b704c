"""Acceptance: gates that compare a new candidate with an old one on the tasks that both were scored
on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .search import Candidate, Search


@dataclass(frozen=True)
class Verdict:
    """What a gate said: true if the new candidate passed; its text gives the numbers."""

    passed: bool
    why: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return self.why


Gate = Callable[[Candidate, Candidate, "Iterable[str] | None"], Verdict]
# (candidate, task ids, bound) -> scores by task id. With a bound it may stop, and return the scores
# that it has, once the mean over all these tasks cannot reach it.
Measure = Callable[[Candidate, Sequence[str], "float | None"], Mapping[str, float]]


def not_worse(new: Candidate, old: Candidate, tasks: Iterable[str] | None = None) -> Verdict:
    """Passes if mean(new) >= mean(old) over `tasks`; None is all that both have. Raises
    `ValueError` if there is none, or one lacks a score."""
    return _compare(new, old, tasks, lambda a, b: a >= b, "not worse", "worse")


def strictly_better(new: Candidate, old: Candidate, tasks: Iterable[str] | None = None) -> Verdict:
    """Passes if mean(new) > mean(old) over `tasks`; as `not_worse` else."""
    return _compare(new, old, tasks, lambda a, b: a > b, "better", "not better")


def better_or_perfect(
    new: Candidate, old: Candidate, tasks: Iterable[str] | None = None
) -> Verdict:
    """Passes if mean(new) > mean(old), or both are equal and at least 1, for scores of at most 1
    (the first gate of LLM-AutoDiff, arXiv:2501.16673); as `not_worse` else."""
    return _compare(
        new, old, tasks, lambda a, b: a > b or a == b >= 1.0, "better, or perfect", "not better"
    )


def always(new: Candidate, old: Candidate, tasks: Iterable[str] | None = None) -> Verdict:
    """Passes every candidate that is not lost."""
    _check_alive(new)
    return Verdict(True, "always accepted")


GATES: dict[str, Gate] = {
    "not_worse": not_worse,
    "strictly_better": strictly_better,
    "better_or_perfect": better_or_perfect,
    "always": always,
}


def two_stage(
    search: Search,
    new: str,
    old: str,
    measure: Measure,
    minibatch: Sequence[str],
    full: Sequence[str],
    *,
    first: Gate = strictly_better,
    second: Gate = not_worse,
) -> Verdict:
    """A gate on a minibatch, then, for those that pass, a gate on the full set (GEPA,
    arXiv:2507.19457: better on the minibatch, then scored on all).

    Each stage measures what the two candidates (ids) lack there, the old one first, and puts it
    into the search. The new one is measured with the old one's mean as the bound, so that `measure`
    can stop early; stopped early, it does not pass.
    """
    verdict = Verdict(True, "")
    for name, tasks, gate in (("minibatch", minibatch, first), ("full set", full, second)):
        if not tasks:
            raise ValueError(f"two_stage: the {name} has no tasks")
        _measure(search, old, tasks, measure, None)
        bound = None if gate is always else mean_over(search[old], tasks)
        _measure(search, new, tasks, measure, bound)
        missing = sum(task not in search[new].scores for task in tasks)
        if missing and bound is not None:
            done = len(tasks) - missing
            return Verdict(
                False,
                f"{name}: only {done} of {len(tasks)} tasks have a score (stopped early, or not to"
                f" be scored); {bound:.4f} cannot be reached",
            )
        verdict = gate(search[new], search[old], tasks)
        verdict = Verdict(verdict.passed, f"{name}: {verdict.why}")
        if not verdict:
            return verdict
    return verdict


def mean_over(candidate: Candidate, tasks: Sequence[str]) -> float:
    """Mean score over these tasks. Raises `ValueError` if one has no score."""
    missing = [task for task in tasks if task not in candidate.scores]
    if missing:
        raise ValueError(
            f"candidate {candidate.id} has no score on {len(missing)} of {len(tasks)} tasks, such"
            f" as {missing[0]!r}"
        )
    return math.fsum(candidate.scores[task] for task in tasks) / len(tasks)


def _measure(
    search: Search, id: str, tasks: Sequence[str], measure: Measure, bound: float | None
) -> None:
    if all(task in search[id].scores for task in tasks):
        return
    scores = measure(search[id], tasks, bound)
    unasked = set(scores) - set(tasks)
    if unasked:
        raise ValueError(f"candidate {id}: scores of tasks that were not asked: {sorted(unasked)}")
    search.score(id, scores)


def _compare(
    new: Candidate,
    old: Candidate,
    tasks: Iterable[str] | None,
    passes: Callable[[float, float], bool],
    yes: str,
    no: str,
) -> Verdict:
    _check_alive(new)
    shared = [t for t in new.scores if t in old.scores] if tasks is None else list(tasks)
    if not shared:
        raise ValueError(
            f"candidates {new.id} and {old.id} were scored on no common task; measure both first"
        )
    mine, other = mean_over(new, shared), mean_over(old, shared)
    passed = passes(mine, other)
    return Verdict(
        passed, f"{yes if passed else no}: {mine:.4f} against {other:.4f} on {len(shared)} tasks"
    )


def _check_alive(candidate: Candidate) -> None:
    if candidate.fault:
        raise ValueError(f"candidate {candidate.id} is lost: {candidate.fault}")
