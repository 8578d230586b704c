"""Measurement of programs: their scores on tasks, and those that give no answer. Used by every
method that compares programs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.programs.program import PROGRAM
from ....agents.settings import Settings, setting
from ....agents.state import TeamState
from ....agents.system import System
from ....agents.types import SettingError, Task
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.types import Episode
from ...collection.rollout_manager import RolloutManager
from ...values.search import Candidate, Search
from .experience import common_fault


@dataclass
class MeasurementConfig(Settings):
    """How programs are measured on validation tasks."""

    validation_rounds: int = setting(
        "plays of each validation task; above 1 they are sampled (greedy_validation: false)",
        1,
        at_least=1,
    )
    greedy_validation: bool = setting(
        "executors at temperature 0 on validation tasks, as on held-out ones; false: at their own",
        True,
    )
    probe: int = setting(
        "tasks that a new program is tried on first: one that answers none of them is lost",
        2,
        at_least=1,
    )

    def check(self) -> None:
        if self.validation_rounds > 1 and self.greedy_validation:
            raise SettingError(
                f"validation_rounds: {self.validation_rounds} plays at temperature 0 are all one;"
                " set greedy_validation: false, or leave it at 1"
            )


@dataclass(frozen=True)
class ProgramMeter:
    """What programs are worth.

    Args:
        rollouts: plays them, or finds what was played before.
        settings: how often, and at which temperature.
        metric: the reward that is a program's score on a task.
        system: a `Program` that plays them; None is the run's own.
    """

    rollouts: RolloutManager
    settings: MeasurementConfig
    metric: str
    system: System | None = None

    def play(self, state: TeamState, program: str, tasks: Sequence[Task]) -> list[Episode]:
        """A program's episodes of these tasks, played once, by a team in this state."""
        if not tasks:
            return []
        return self.rollouts.play(
            tasks,
            state.with_values({PROGRAM: program}),
            n=self.settings.validation_rounds,
            greedy=self.settings.greedy_validation,
            system=self.system,
        )

    def measure(
        self, search: Search, candidate: Candidate, state: TeamState, tasks: Sequence[Task]
    ) -> Candidate:
        """Score a candidate on the tasks; one that answers none of the first `probe`, or none at
        all, is lost. Measuring it again costs nothing."""
        if candidate.fault:
            return candidate
        episodes: list[Episode] = []
        for part in (tasks[: self.settings.probe], tasks[self.settings.probe :]):
            episodes += self.play(state, str(candidate.values[PROGRAM]), part)
            if fault := common_fault(episodes):
                return search.lose(candidate.id, fault)
        return search.score(candidate.id, evaluation(tasks, episodes, self.metric).scores)


def program_rows(search: Search) -> list[dict[str, Any]]:
    """The tree of a search, for `summary.json`: each program with its score and its difference to
    its parent; without a parent, or with many, the whole program."""
    return [_row(candidate, search) for candidate in search.candidates]


def _row(candidate: Candidate, search: Search) -> dict[str, Any]:
    parent = search[candidate.parents[0]] if len(candidate.parents) == 1 else None
    before = _lines(parent.values) if parent else []
    after = _lines(candidate.values)
    diff = difflib.unified_diff(before, after, lineterm="", n=1)
    return {
        "id": candidate.id,
        "parents": list(candidate.parents),
        "round": candidate.round,
        "proposer": candidate.proposer,
        "score": candidate.mean if candidate.scores else None,
        "note": candidate.note,
        "fault": candidate.fault,
        "verdict": candidate.verdict,
        "diff": list(diff)[2:] if parent and after else after,
    }


def _lines(values: Mapping[str, Any]) -> list[str]:
    return str(values.get(PROGRAM, "")).splitlines()
