"""Allocation of models to modules: scores of one module's models, the choice among them, and when
the search ends (LLMSelector, arXiv:2502.14815, algorithm 1). Pure Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

Scores = Mapping[str, Mapping[str, float]]  # by model, by task
RULES = ("mean", "votes")


def module_score(correct: float, guilt: float, alpha: float, beta: float) -> float:
    """What a model is worth in a module on one task: beta x end-to-end score + alpha x (1 - guilt),
    where guilt is the diagnoser's verdict that the module caused the error (1 yes, 0 no, 0.5
    unread)."""
    return beta * correct + alpha * (1 - guilt)


def best_sets(scores: Scores) -> dict[str, list[str]]:
    """By task, all models with its highest score, in the order of the models."""
    sets: dict[str, list[str]] = {}
    for task in next(iter(scores.values())):
        highest = max(own[task] for own in scores.values())
        sets[task] = [model for model, own in scores.items() if own[task] == highest]
    return sets


def votes(sets: Mapping[str, Sequence[str]]) -> Counter[str]:
    """How many tasks count a model among their best."""
    return Counter(model for best in sets.values() for model in best)


def worth(scores: Scores, rule: str) -> dict[str, float]:
    """By model: its mean score (`mean`), or the share of tasks that count it among their best
    (`votes`)."""
    if rule == "votes":
        found = votes(best_sets(scores))
        return {model: found[model] / len(own) for model, own in scores.items()}
    return {model: math.fsum(own.values()) / len(own) for model, own in scores.items()}


def choice(
    worths: Mapping[str, float], current: str, prices: Mapping[str, float] | None = None
) -> str:
    """The model that is worth most. Of equal ones the current one, else the cheapest (`prices`; 0
    where there is none), else the first."""
    most = max(worths.values())
    tied = [model for model in worths if worths[model] == most]
    return current if current in tied else min(tied, key=lambda m: (prices or {}).get(m, 0.0))


def converged(history: Sequence[Sequence[str]], modules: int) -> bool:
    """Whether the last L + 1 allocations are one: every module was tried and none changed."""
    last = [tuple(allocation) for allocation in history[-modules - 1 :]]
    return len(last) == modules + 1 and len({*last}) == 1


def affordable(spent: int, budget: int, models: int) -> bool:
    """Whether one more step, which measures |K| - 1 further allocations, fits the budget of the
    search; 0 is no bound."""
    return not budget or spent <= budget - (models - 1)
