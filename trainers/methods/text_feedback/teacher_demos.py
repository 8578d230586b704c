"""Demonstrations of a teacher, drawn where it does better than the team: the part of LLM-AutoDiff
(arXiv:2501.16673) that learns from examples and not from words."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.state import TeamState
from ....agents.types import SettingError, Task
from ....rollouts.types import Episode
from ...collection.rollout_manager import RolloutManager
from ...credit.filtering import SelectionConfig, filter_turns
from ...feedback.evaluators import score_of
from ...loop.evaluator import Evaluator
from ...loop.spec import RunSpec
from ...values.memory import Memory
from ..imitation.sft import opening_messages, openings
from ..prompts.bootstrapping.demos import Demos, demo_values, demos_of
from ..prompts.bootstrapping.teacher import TeacherConfig

FLOOR = 1e-5  # weight of a task on which the teacher is no better


@dataclass
class TeacherDemosConfig(TeacherConfig):
    """Whose runs become demonstrations (`TeacherConfig`), and how many of them."""

    num_demos: int = setting(
        "demonstrations per agent that a step proposes after the texts, from runs of the `teacher`;"
        " 0: none",
        0,
        at_least=0,
    )

    def check_demos(self) -> None:
        """Raise `SettingError` if there are demonstrations without a teacher, or the reverse."""
        if bool(self.num_demos) != bool(self.teacher_values):
            raise SettingError(
                f"num_demos: {self.num_demos} with teacher {self.teacher_values}; expected both:"
                " how many demonstrations, and the values in which the teacher differs"
            )


class TeacherDemos:
    """Proposes sets of demonstrations, a set per step.

    `pool` remembers, by task, by how much the teacher was better, and the demonstrations of its
    run. Every rank has to call `propose`.

    Args:
        config, spec, rollouts, evaluator: of the run. Raises `SettingError` for a teacher that
            cannot be.
    """

    def __init__(
        self,
        config: TeacherDemosConfig,
        spec: RunSpec,
        rollouts: RolloutManager,
        evaluator: Evaluator,
    ) -> None:
        config.check_teacher(spec)
        self.config, self.spec = config, spec
        self.rollouts, self.evaluator = rollouts, evaluator
        self.pool = Memory("teacher_demos")
        self.pool["tasks"] = {}

    def propose(
        self, step: int, state: TeamState, tasks: Sequence[Task], scores: Mapping[str, float]
    ) -> tuple[TeamState | None, dict[str, Any]]:
        """The state with a new set, None unless it is strictly better on the validation tasks; and
        the step's metrics.

        Args:
            state: in force. tasks: of the step. scores: the team's on them, by id.
        """
        self._remember(self.config.teacher_state(state), tasks, scores)
        pool = self.pool["tasks"]
        rng = random.Random(derive_seed(self.spec.config.seed, "teacher demos", step))
        ids = drawn(list(pool), demo_weights(pool.values()), self.config.num_demos, rng)
        row: dict[str, Any] = {"pool": len(pool), "drawn": ids, "adopted": False}
        values = self._values(ids)
        if not values:
            return None, row
        val, new = self.spec.val_tasks, state.with_values(values)
        old = mean(self.evaluator.measure(state, val).scores.values())
        measured = self.evaluator.measure(new, val, above=old)
        row["adopted"] = not measured.left and mean(measured.scores.values()) > old
        return (new if row["adopted"] else None), row

    def _remember(
        self, teacher: TeamState, tasks: Sequence[Task], scores: Mapping[str, float]
    ) -> None:
        asked = [task for task in tasks if task.id in scores]
        runs = [e for e in self.rollouts.play(asked, teacher, greedy=True) if e.parent is None]
        demos = self._demos(runs, teacher)
        found = {
            run.task.id: {
                "teacher": score_of(run, self.spec.metric),
                "student": scores[run.task.id],
                "demos": demo_values({a: [d] for a, d in demos[run.task.id].items()}),
            }
            for run in runs
            if demos[run.task.id]
        }
        self.pool["tasks"] = {**self.pool["tasks"], **found}

    def _demos(self, runs: Sequence[Episode], teacher: TeamState) -> dict[str, Demos]:
        """A demonstration per agent of each successful run, by the id of its task."""
        system, values = self.spec.system, teacher.values
        kept = filter_turns(runs, SelectionConfig(), openings=openings(system, values)).weights
        heads = opening_messages(system, values)
        return {run.task.id: demos_of(run, kept.keys(), heads) for run in runs}

    def _values(self, ids: Sequence[str]) -> dict[str, list[Any]]:
        """`NAME.demos` of these tasks, by name."""
        values: dict[str, list[Any]] = {}
        for id in ids:
            for name, messages in self.pool["tasks"][id]["demos"].items():
                values.setdefault(name, []).extend(messages)
        return values


def demo_weights(tasks: Any) -> list[float]:
    """w_i = (max(T_i - S_i, 0) + 1e-5) / sum over j, of the teacher's scores T and the team's S.

    tasks: mappings with `teacher` and `student`.
    """
    gains = [max(task["teacher"] - task["student"], 0.0) + FLOOR for task in tasks]
    return [gain / sum(gains) for gain in gains]


def drawn(ids: Sequence[str], weights: Sequence[float], k: int, rng: random.Random) -> list[str]:
    """At most `k` ids, one after the other without replacement, with chances by their weights."""
    left = dict(zip(ids, weights, strict=True))
    found: list[str] = []
    while left and len(found) < k:
        (id,) = rng.choices([*left], [*left.values()])
        found.append(id)
        del left[id]
    return found


def mean(scores: Any) -> float:
    """The mean of scores, of which there is one at least."""
    own = list(scores)
    return float(sum(own) / len(own))
