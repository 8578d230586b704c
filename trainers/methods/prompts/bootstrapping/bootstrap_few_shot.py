"""Few-shot bootstrapping: the team plays, its successful turns become demonstrations of its agents,
and of several sets of them the one that is best on validation tasks is kept.

BootstrapFewShot and its random search of DSPy (Khattab et al., arXiv:2310.03714). A step makes one
candidate, in this order: without demonstrations; labelled ones alone; bootstrapped from the tasks
in order; then `num_candidate_programs` times bootstrapped from shuffled tasks, a random number of
them. A bootstrapped set are the turns of the first successful runs of a teacher, one turn per agent
and run, filled up with labelled ones (`demos.py`). Every candidate is measured on the validation
tasks and adopted if it is better than the best so far, the team as it began included. No weight
moves. `candidates: [unshuffled]` with `num_val_tasks: 0` is BootstrapFewShot alone: its set is
adopted without a measurement.

Against the authors' code: candidates are compared on tasks of their own, never on those that were
bootstrapped from; the team as it began is a candidate, so demonstrations that somebody wrote are
kept unless others are better; success is a reward of at least `success_threshold`, not any number
but 0; what saw the answer or was shown its own question is no demonstration; every agent draws its
labelled demonstrations from all tasks (there the second module draws among the first one's);
`labeled_demos` says how they are written, since an agent has no named fields; a candidate that
cannot win any more is not measured to the end. The first try of a task is at temperature 0, later
ones at the run's. Not taken over: the ensemble of the best candidates.

accelerate launch recipes/bootstrap_few_shot.py [--config recipes/bootstrap_few_shot.yaml]
    [--field value]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .....agents.settings import setting
from .....agents.state import TeamState
from .....agents.types import SettingError
from ....config import RunConfig
from ....credit.filtering import SelectionConfig
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....values.acceptance import always, strictly_better
from ....values.parts import Part
from ....values.search import Candidate, Search
from .bootstrapper import BootstrapConfig, Bootstrapper
from .demos import KINDS, candidate_name, candidate_numbers, demo_values


@dataclass
class BootstrapFewShotConfig(RunConfig, BootstrapConfig, SelectionConfig):
    """`RunConfig` with candidates and what they are made of (`BootstrapConfig`)."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/bootstrap_few_shot"
    )
    candidates: list[str] = setting(
        "which sets are tried: zero-shot, labeled, unshuffled, shuffled",
        factory=lambda: list(KINDS),
        choices=KINDS,
    )
    num_candidate_programs: int = setting("sets from shuffled tasks", 16, at_least=0)
    stop_at_score: float | None = setting(
        "end once a candidate's validation score is at least this", None
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which candidates are compared", 100, at_least=0
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )
    max_steps: int = setting(
        "follows from the candidates: a step is one; leave it out", 0, at_least=0
    )

    def check(self) -> None:
        count = len(self.numbers)
        if not count:
            raise SettingError(
                "candidates: none to try; name some, with num_candidate_programs above 0 for"
                " shuffled"
            )
        if self.max_steps not in (0, count):
            raise SettingError(
                f"max_steps: a step is a candidate and there are {count}, so leave it out; got"
                f" {self.max_steps}"
            )
        self.max_steps = count
        if count > 1 and not self.num_val_tasks:
            raise SettingError(
                f"num_val_tasks: {count} candidates are compared on validation tasks; set it above"
                " 0, or try a single candidate"
            )

    @property
    def numbers(self) -> list[int]:
        """The numbers of the candidates, see `candidate_numbers`."""
        return candidate_numbers(self.candidates, self.num_candidate_programs)


class BootstrapFewShotTrainer(Trainer[BootstrapFewShotConfig]):
    """Finds demonstrations for the agents of a team. Arguments: see `Trainer`.

    trainer = BootstrapFewShotTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                                      tasks="gsm8k", args=BootstrapFewShotConfig())
    trainer.train()
    """

    Config = BootstrapFewShotConfig

    def parts(self) -> Sequence[Part]:
        self.demos = Bootstrapper(self.run.rollouts, self.spec, self.args, self.args)
        self.student = self.demos.student
        self.search = Search("demos", self.args.seed)
        return [self.search]

    # one candidate

    def step(self, step: int) -> StepResult:
        """Make one candidate, measure it, and adopt it if it is the best."""
        number = self.args.numbers[step - 1]
        start = self._start()
        chosen, runs = self.demos.candidate(number, self.run.state)
        values = demo_values(chosen)
        known = self.search.find(values)
        name, note = candidate_name(number), f"{runs} successful runs"
        if known is None:
            new = Candidate(values, proposer=name, note=note, parents=(start.id,), round=step)
            candidate = self._judged(self.search.add(new))
            self.run.log.say(f"step {step}: {name}, {note}: {candidate.verdict}")
        else:  # what is known of it holds
            candidate = known
            self.run.log.say(f"step {step}: {name}: the same set as candidate {known.id}")
        best = self.search.current
        assert best is not None
        adopted = known is None and best.id == candidate.id
        row = {
            "name": name,
            "id": candidate.id,
            "runs": runs,
            "demos": {agent: len(demos) for agent, demos in chosen.items()},
            "score": self._score(candidate),
            "num_tasks": len(candidate.scores),
            "adopted": adopted,
            "best": best.id,
        }
        return StepResult(
            {"candidate": row, "policies": self.rows({}, ())},
            state=self.run.state.with_values(values) if adopted else None,
            done=self._done(best),
        )

    def _start(self) -> Candidate:
        """The team as it began, measured: what a candidate has to beat."""
        known = self.search.find(self.student)
        if known is not None:
            return known
        start = self.search.add(Candidate(self.student, proposer="start"))
        if self.spec.val_tasks:
            self._measure(start, self.run.state, above=None)
        return self.search.adopt(start.id, "the team as it began")

    def _judged(self, candidate: Candidate) -> Candidate:
        """The candidate with its scores and verdict, adopted if it is better than the best; without
        validation tasks it is adopted."""
        best, tasks = self.search.current, [task.id for task in self.spec.val_tasks]
        assert best is not None
        if not tasks:
            return self.search.adopt(candidate.id, always(candidate, best))
        state = self.run.state.with_values(candidate.values)
        left = self._measure(candidate, state, above=best.mean)
        if left:
            why = f"stopped after {len(tasks) - left} of {len(tasks)} tasks: it cannot win"
            return self.search.reject(candidate.id, why)
        verdict = strictly_better(self.search[candidate.id], best, tasks)
        end = self.search.adopt if verdict else self.search.reject
        return end(candidate.id, verdict)

    def _measure(self, candidate: Candidate, state: TeamState, above: float | None) -> int:
        """Score a candidate on the validation tasks; how many were not played, since it cannot
        exceed the bound."""
        result = self.run.evaluator.measure(state, self.spec.val_tasks, above=above)
        self.search.score(candidate.id, result.scores)
        return result.left

    def _score(self, candidate: Candidate) -> float | None:
        """Its mean on the validation tasks; None unless all were played."""
        whole = len(candidate.scores) == len(self.spec.val_tasks) > 0
        return candidate.mean if whole else None

    def _done(self, best: Candidate) -> str:
        bound = self.args.stop_at_score
        if bound is None or not best.scores or best.mean < bound:
            return ""
        return f"stop_at_score: {best.mean:.4f} on validation"

    def report(self) -> dict[str, Any]:
        """Also `candidates`: the best first, those that were not measured to the end last."""
        scored = [(self._score(c), c) for c in self.search.candidates]
        scored.sort(key=lambda pair: (pair[0] is None, -(pair[0] or 0.0)))
        rows = [
            {"id": c.id, "name": c.proposer, "score": score, "verdict": c.verdict}
            for score, c in scored
        ]
        return {**super().report(), "candidates": rows}
