"""Bootstrapping: the demonstrations of a candidate, from the successful runs of a team's teacher
and from labelled tasks (DSPy's BootstrapFewShot); what the methods that need it share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .....agents.settings import Settings, mapping, parsed_mapping, setting
from .....agents.state import TeamState
from .....agents.types import SettingError, Task, from_json, nearest, to_json
from .....rollouts.types import Episode
from ....collection.rollout_manager import RolloutManager
from ....credit.filtering import SelectionConfig, filter_turns
from ....loop.spec import RunSpec
from ...imitation.sft import opening_messages, openings
from .demos import (
    LABELED,
    ZERO_SHOT,
    Demo,
    Demos,
    DemoSets,
    DemoTemplate,
    bootstrap_sets,
    demo_values,
    demos_of,
    drawn_size,
    drawn_tasks,
    without_task,
)
from .teacher import TeacherConfig


@dataclass
class DemoConfig(Settings):
    """How many demonstrations an agent gets, and where they come from."""

    max_bootstrapped_demos: int = setting("most bootstrapped demonstrations", 4, at_least=1)
    max_labeled_demos: int = setting(
        "most demonstrations of an agent where labelled ones fill up", 16, at_least=0
    )
    labeled_demos: dict | str | None = setting(
        "by agent: `user` and `assistant`, templates of its labelled demonstrations with the fields"
        " prompt, answer and the task's meta; agents that are not named get none",
        factory=dict,
    )
    max_rounds: int = setting(
        "tries of a task, the first at temperature 0, the others sampled", 1, at_least=1
    )

    def prepare(self) -> None:
        self.labeled_demos = parsed_mapping("labeled_demos", self.labeled_demos)

    def templates(self, agents: Sequence[str]) -> dict[str, DemoTemplate]:
        """How labelled demonstrations are written, by agent. Raises `SettingError`."""
        given: Mapping[str, Any] = self.labeled_demos  # type: ignore[assignment]
        for name in given:
            if name not in agents:
                raise SettingError(f"labeled_demos.{name}: no such agent; {nearest(name, agents)}")
        where = "labeled_demos."
        return {
            name: from_json(DemoTemplate, mapping(where + name, fields), where + name)
            for name, fields in given.items()
        }


@dataclass
class BootstrapConfig(TeacherConfig, DemoConfig):
    """Whose turns are shown (`TeacherConfig`), and how many (`DemoConfig`)."""


class Bootstrapper:
    """Makes the demonstration sets of a run's candidates.

    Args:
        rollouts: plays the teacher; every rank has to call what plays.
        spec: the method's tasks, and the values that its team begins with.
        config: how many demonstrations, and whose. Raises `SettingError` for a teacher or a
            template that cannot be.
        selection: which turns may be shown.

    `student`: the demonstrations that the team begins with, by the name of their value.
    """

    def __init__(
        self,
        rollouts: RolloutManager,
        spec: RunSpec,
        config: BootstrapConfig,
        selection: SelectionConfig,
    ) -> None:
        self.rollouts, self.spec, self.config = rollouts, spec, config
        self.selection = selection
        system = self.spec.system
        config.check_teacher(self.spec)
        agents = [agent.name for agent in system.specs]
        seed = self.spec.config.seed
        self.sets = DemoSets(agents, config.templates(agents), config.max_labeled_demos, seed)
        self.labeled = self.sets.labeled(self.spec.tasks)
        given = {**{param.name: param.value for param in system.params()}, **self.spec.values}
        self.student = {f"{agent}.demos": to_json(given[f"{agent}.demos"]) for agent in agents}

    def candidate(self, number: int, state: TeamState) -> tuple[dict[str, list[Demo]], int]:
        """The set of this number (see `demos.candidate_numbers`), by agent, and how many successful
        runs it is made of. `state`: the one in force."""
        return self.candidates([number], state)[0]

    def candidates(
        self, numbers: Sequence[int], state: TeamState
    ) -> list[tuple[dict[str, list[Demo]], int]]:
        """Several, as `candidate` gives each; their runs are played side by side."""
        bootstrapped = [number for number in numbers if number not in (ZERO_SHOT, LABELED)]
        found = dict(zip(bootstrapped, self._successes(bootstrapped, state), strict=True))
        return [(self._set(n, found.get(n, ())), len(found.get(n, ()))) for n in numbers]

    def successes(self, number: int, state: TeamState, size: int) -> list[Demos]:
        """The demonstrations of the first `size` successful runs in this candidate's order of
        tasks."""
        return self._successes([number], state, size)[0]

    def _successes(
        self, numbers: Sequence[int], state: TeamState, size: int | None = None
    ) -> list[list[Demos]]:
        """For each candidate, of as many runs as `size` says, or as `demos.drawn_size` draws."""
        config, seed = self.config, self.spec.config.seed

        def count(number: int) -> int:
            return drawn_size(config.max_bootstrapped_demos, number, seed) if size is None else size

        return bootstrap_sets(
            [(drawn_tasks(self.spec.tasks, n, seed), count(n)) for n in numbers],
            config.max_rounds,
            functools.partial(self._attempt, state),
        )

    def _set(self, number: int, successes: Sequence[Demos]) -> dict[str, list[Demo]]:
        nothing: dict[str, list[Demo]] = {agent: [] for agent in self.sets.agents}
        if number == ZERO_SHOT:
            return nothing
        if number == LABELED:
            return nothing | self.labeled
        size = drawn_size(self.config.max_bootstrapped_demos, number, self.spec.config.seed)
        return self.sets.filled(successes, self.spec.tasks, size)

    def _attempt(self, state: TeamState, tasks: Sequence[Task], number: int) -> list[Demos]:
        """Each task's demonstrations from a run of its teacher, none if the run failed; the
        `number`-th try (0: at temperature 0)."""
        by_state: dict[str, tuple[TeamState, list[Task]]] = {}
        for task in tasks:
            teacher = self._teacher(state, task)
            by_state.setdefault(teacher.key, (teacher, []))[1].append(task)
        found: dict[str, Demos] = {}
        for teacher, own in by_state.values():
            played = self.rollouts.play(own, teacher, n=max(number, 1), greedy=not number)
            runs = [e for e in played if e.parent is None]
            last = {episode.task.id: episode for episode in runs}  # later samples come later
            found |= self._demos(list(last.values()), teacher)
        return [found[task.id] for task in tasks]

    def _teacher(self, state: TeamState, task: Task) -> TeamState:
        """The teacher's state for a task: the team as it began; agents with labelled demonstrations
        have these, but the task's own."""
        labeled = demo_values(without_task(self.labeled, task))
        return self.config.teacher_state(state.with_values({**self.student, **labeled}))

    def _demos(self, episodes: Sequence[Episode], state: TeamState) -> dict[str, Demos]:
        """The demonstrations of each run by the id of its task, see `demos_of`."""
        system, seed = self.spec.system, self.spec.config.seed
        kept = filter_turns(
            episodes, self.selection, openings=openings(system, state.values), seed=seed
        ).weights
        heads = opening_messages(system, state.values)
        return {episode.task.id: demos_of(episode, kept.keys(), heads) for episode in episodes}
