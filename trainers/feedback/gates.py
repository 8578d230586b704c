"""Gates of feedback methods: whether proposed values replace those in force."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...agents.state import TeamState
from ...agents.types import Task
from ..loop.evaluator import Evaluator
from ..values.acceptance import GATES, Verdict, always, mean_over, two_stage
from ..values.search import Candidate, Search


@dataclass(frozen=True)
class Scorer:
    """What a gate measures with: the run's evaluator, the state in force, and the validation tasks.

    `own`: what params are where the state has no value of their name.
    """

    evaluator: Evaluator
    state: TeamState
    val_tasks: Sequence[Task]
    own: Mapping[str, Any] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, Any]) -> TeamState:
        """The state that these values would be in force in: what stays the system's own is none of
        its values, so that what is measured here is not measured again there."""
        known = self.state.values
        return self.state.with_values(
            {
                name: value
                for name, value in values.items()
                if name in known or name not in self.own or value != self.own[name]
            }
        )


class Gate(Protocol):
    """Compares a candidate with the one in force; measures what it needs, the scores go into the
    archive."""

    def judge(
        self, scorer: Scorer, search: Search, new: str, old: str, batch: Sequence[Task]
    ) -> Verdict:
        """Whether candidate `new` replaces `old` (ids). `batch`: tasks that the step played."""


@dataclass(frozen=True)
class ValidationGate:
    """Both are scored on the validation tasks: `not_worse`, `strictly_better`, or `always`, which
    measures nothing. A candidate that cannot pass any more is not played to the end."""

    rule: str = "not_worse"

    def judge(
        self, scorer: Scorer, search: Search, new: str, old: str, batch: Sequence[Task]
    ) -> Verdict:
        gate, tasks = GATES[self.rule], scorer.val_tasks
        if gate is always:
            return gate(search[new], search[old], None)
        ids = [task.id for task in tasks]
        measure = _Measure(scorer, tasks, lambda asked: self.rule)
        measure.score(search, old, ids, None)
        bound = mean_over(search[old], ids)
        measure.score(search, new, ids, bound)
        if measure.failures:
            return Verdict(False, measure.failures[0])
        left = sum(id not in search[new].scores for id in ids)
        if left:
            done = f"{len(ids) - left} of {len(ids)} tasks"
            why = f"stopped after {done}: {bound:.4f} is out of reach"
            return Verdict(False, why)
        return gate(search[new], search[old], ids)


@dataclass(frozen=True)
class TwoStageGate:
    """First on tasks that the step played, then on the validation tasks (LLM-AutoDiff,
    arXiv:2501.16673). Each stage is one of `acceptance.GATES`; a candidate that cannot pass a stage
    any more is not played to its end."""

    first: str = "better_or_perfect"
    second: str = "strictly_better"

    def judge(
        self, scorer: Scorer, search: Search, new: str, old: str, batch: Sequence[Task]
    ) -> Verdict:
        ids = {task.id for task in batch}
        measure = _Measure(
            scorer,
            [*batch, *scorer.val_tasks],
            lambda asked: self.first if asked[0] in ids else self.second,
        )
        verdict = two_stage(
            search,
            new,
            old,
            measure,
            [task.id for task in batch],
            [task.id for task in scorer.val_tasks],
            first=GATES[self.first],
            second=GATES[self.second],
        )
        return Verdict(False, measure.failures[0]) if measure.failures else verdict


@dataclass
class _Measure:
    """Scores of a candidate's values on tasks by their ids; `rule_of` names the gate that compares
    them.

    `failures`: why nothing of a candidate could be played, where every one of its episodes failed:
    a text past the context length. Its scores of 0 would not be worse than others.
    """

    scorer: Scorer
    tasks: Sequence[Task]
    rule_of: Callable[[Sequence[str]], str]
    failures: list[str] = field(default_factory=list)

    def score(self, search: Search, id: str, ids: Sequence[str], bound: float | None) -> None:
        """Put into the archive what a candidate's scores lack."""
        if any(task not in search[id].scores for task in ids):
            search.score(id, self(search[id], ids, bound))

    def __call__(
        self, candidate: Candidate, ids: Sequence[str], bound: float | None
    ) -> Mapping[str, float]:
        by_id = {task.id: task for task in self.tasks}
        tasks = [by_id[id] for id in ids if id not in candidate.scores]
        if len(tasks) < len(ids):
            bound = None  # the bound is of all tasks
        rule = self.rule_of(ids)
        strict = rule == "strictly_better" or (
            rule == "better_or_perfect" and bound is not None and bound < 1.0
        )
        if bound is not None and not strict:
            bound = math.nextafter(bound, -math.inf)  # an equal score passes too
        state = self.scorer.with_values(candidate.values)
        result = self.scorer.evaluator.measure(state, tasks, above=bound)
        if result.failed == len(result.scores) and candidate.parents:
            self.failures.append(f"every episode failed; the first one: {result.errors[0]}")
        return result.scores
