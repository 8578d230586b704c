"""What searches over programs share: the archive, the measurement of a program on validation tasks,
lost programs, and the best one as the state of the run.

A step is one round: `propose` gives a candidate, which is measured and kept whatever its score. A
method overrides `propose`. Programs run in the sandbox alone. A program that gives no answer to the
first `probe` tasks, or to any, is lost, with the reason; so is one that cannot be run at all. The
best by validation is in force from the end of its round on; held-out tasks are played before and
after the run only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ....agents.programs.program import PROGRAM, Program
from ....agents.settings import Settings, setting
from ....agents.types import AgentSpec, Sampling, SettingError, Task
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.types import Episode
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.memory import Memory
from ...values.parts import Part
from ...values.search import Candidate, Duplicate, Search
from .convergence import most_varied
from .measurement import ProgramMeter, program_rows
from .proposals import Proposal


@dataclass
class WorkflowSearchConfig(Settings):
    """A search over programs, beside `MeasurementConfig`. It stands before `RunConfig` among a
    method's bases: some defaults are other ones."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    max_steps: int = setting("rounds: programs that are proposed", 20, at_least=1)
    num_val_tasks: int = setting(
        "tasks cut from the training ones, on which programs are compared", 100, at_least=1
    )
    pick_tasks: int = setting(
        "compare on those validation tasks alone whose score varies most over pick_rounds plays of"
        " the first program; 0: on all",
        0,
        at_least=0,
    )
    pick_rounds: int = setting("sampled plays by which tasks are picked", 5, at_least=2)
    max_program_length: int = setting(
        "tokens of a helper's reply, unless its sampling says otherwise", 2048, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )

    def check(self) -> None:
        if self.pick_tasks > self.num_val_tasks:
            raise SettingError(
                f"pick_tasks: {self.pick_tasks} of {self.num_val_tasks} validation tasks;"
                " num_val_tasks says how many there are"
            )


C = TypeVar("C", bound=Any)  # a WorkflowSearchConfig and MeasurementConfig that is a RunConfig


class WorkflowSearchTrainer(Trainer[C]):
    """Base of searches over programs. Arguments: see `Trainer`; the system is a `Program`."""

    def parts(self) -> Sequence[Part]:
        if not isinstance(self.spec.system, Program):
            raise SettingError(
                f"system.class: {type(self.spec.system).__name__} has no program to search for; use"
                " marlora.agents.programs.program:Program"
            )
        self.target: Program = self.spec.system
        for name in self.helper_names():
            self.helper(name)
        self.starts()  # what cannot be begun with is said at once
        self.search = Search("programs", self.args.seed)
        self.memory = Memory("search")  # the tasks that were picked
        self.meter = ProgramMeter(self.run.rollouts, self.args, self.spec.metric)
        return [self.search, self.memory]

    def helper_names(self) -> Sequence[str]:
        """Helpers that the method asks."""
        return ("proposer",)

    def helper(self, name: str) -> AgentSpec:
        """The helper, with room for a whole program."""
        agent = self.spec.helper(name)
        own = Sampling(temperature=self.args.temperature, max_tokens=self.args.max_program_length)
        return dataclasses.replace(agent, sampling=agent.sampling or own)

    def starts(self) -> Sequence[Proposal]:
        """The programs that the search begins with: the team's own."""
        own = str(self.spec.values.get(PROGRAM, self.target.program))
        return [Proposal("the first program", own)]

    def propose(self, step: int) -> Candidate | None:
        """A new candidate, in the archive, measured or lost; None if all were duplicates."""
        raise NotImplementedError(f"{type(self).__name__} proposes nothing")

    def ended(self) -> str:
        """Why the search ends now; "" to go on."""
        return ""

    # one round

    def step(self, step: int) -> StepResult:
        """One proposal and its measurement."""
        if step == 1:
            self._begin()
        new = self.propose(step)
        best, before = self.search.best(), self.search.current
        assert before is not None
        if best.id != before.id:
            self.search.adopt(best.id, f"best by validation: {best.mean:.4f}")
        self.run.log.say(f"step {step}: {_line(new)}; best {best.id}: {best.mean:.4f}")
        row = {
            "id": new.id if new else None,
            "parents": list(new.parents) if new else [],
            "score": new.mean if new and new.scores else None,
            "fault": new.fault if new else "duplicate",
            "note": new.note if new else "",
            "best": best.id,
            "best_score": best.mean,
            "duplicates": self.search.duplicates,
        }
        return StepResult(
            {"program": row, "policies": self.rows({}, ())},
            state=self.run.state.with_values(best.values),
            done=self.ended(),
        )

    def _begin(self) -> None:
        """Pick the tasks, and measure what the search begins with."""
        first, *others = self.starts()
        if self.args.pick_tasks:
            self.memory["tasks"] = self._picked(first.program)
        for proposal in (first, *others):
            values = {PROGRAM: proposal.program}
            if self.search.find(values) is None:
                added = self.search.add(Candidate(values, "start", proposal.note))
                self.measure(added)
        if not self.search.pool():
            faults = "; ".join(each.fault for each in self.search.candidates)
            raise SettingError(f"system.program: no program to begin with can be used: {faults}")
        self.search.adopt(self.search.best().id, "the best to begin with")

    def _picked(self, program: str) -> list[str]:
        """The ids of the validation tasks whose score varies most."""
        rounds, tasks = self.args.pick_rounds, self.spec.val_tasks
        state = self.run.state.with_values({PROGRAM: program})
        episodes = self.run.rollouts.play(tasks, state, n=rounds)
        plays: dict[str, list[float]] = {task.id: [] for task in tasks}
        for episode in episodes:
            if episode.parent is None:
                score = evaluation([episode.task], [episode], self.spec.metric).scores
                plays[episode.task.id].append(score[episode.task.id])
        return most_varied(plays, self.args.pick_tasks)

    @property
    def tasks(self) -> list[Task]:
        """The validation tasks on which programs are compared."""
        picked = self.memory.get("tasks")
        return [t for t in self.spec.val_tasks if picked is None or t.id in picked]

    # candidates

    def enter(
        self, proposal: Proposal, parents: Sequence[Candidate], step: int
    ) -> Candidate | None:
        """Put a proposal into the archive; None, and counted, if its program is there already. One
        that was kept without a measurement is taken up."""
        values = {PROGRAM: proposal.program} if proposal.program else {}
        ids = tuple(each.id for each in parents)
        by, note, fault = proposal.proposer, proposal.note, proposal.fault
        new = Candidate(values, by, note, fault, parents=ids, round=step)
        known = self.search.find(values) if values else None
        if known is not None and not known.fault and not known.scores:
            return known
        try:
            return self.search.add(new)
        except Duplicate:
            return None

    def measure(self, candidate: Candidate) -> Candidate:
        """Score a candidate on the tasks, see `ProgramMeter`."""
        return self.meter.measure(self.search, candidate, self.run.state, self.tasks)

    def played(self, candidate: Candidate, tasks: Sequence[Task]) -> list[Episode]:
        """A candidate's episodes of these tasks, played once."""
        return self.meter.play(self.run.state, str(candidate.values[PROGRAM]), tasks)

    def report(self) -> dict[str, Any]:
        """Also `programs`: the tree of the search, see `program_rows`."""
        return {**super().report(), "programs": program_rows(self.search)}


def _line(candidate: Candidate | None) -> str:
    if candidate is None:
        return "only duplicates"
    if candidate.fault:
        return f"program {candidate.id} is lost: {candidate.fault}"
    return f"program {candidate.id}: {candidate.mean:.4f}"
