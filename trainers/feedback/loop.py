"""Feedback in words: play, judge, propagate, rewrite, accept. One loop for the methods of
`trainers/methods/text_feedback/`.

A method is a page: its settings, its prompts, and one of each

    evaluator   (`evaluators.py`)   RuleWords | Judges                 an episode -> a Judgement
    propagator  (`propagators.py`)  PerEdge | PerNode | Requirements | WholeGraph
                                                                judgements -> Feedback by param
    rewriter    (`rewriters.py`)    PerParam | Jointly | StructureEdits (`edits.py`)
                                                                feedback -> a Proposal of values
    view        (`history.py`)      no_history | past_values | best_values | failed_proposals |
                                    last_updates | views(...)   what the rewriter sees of the past
    gate        (`gates.py`)        ValidationGate | TwoStageGate      does the proposal replace
                                                                       the values in force?

    class MyTrainer(FeedbackTrainer[MyConfig]):  # methods/text_feedback/feedback_trainer.py
        Config = MyConfig

        def pieces(self) -> Pieces:
            return Pieces(
                PROMPTS, evaluator=RuleWords(self.spec.metric), propagator=PerEdge(),
                rewriter=PerParam(), view=no_history, gate=ValidationGate(self.args.gate),
            )

A new kind of any of them is a class with the one method of its protocol; it asks helpers through
`Helpers.ask`, so its calls are recorded, metered and replayed on resume, and takes its prompts from
`Helpers.prompt`, so that a setting (`prompts`) can change them. A method that draws its own tasks,
or keeps errors, gives the step's episodes to `FeedbackLoop.learn` itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...agents.state import TeamState
from ...agents.text.tags import shortened
from ...agents.types import BASE, Task, to_json
from ...rollouts.types import Episode
from ..collection.rollout_manager import RolloutManager
from ..loop.evaluator import Evaluator as RunEvaluator
from ..loop.spec import RunSpec
from ..loop.step_result import StepResult
from ..monitoring.run_log import RunLog
from ..values.acceptance import Verdict, mean_over
from ..values.parts import Part
from ..values.search import Candidate, Search, Select
from .backward import ByParam, Case
from .config import FeedbackConfig
from .evaluators import Evaluator, Shuffled
from .gates import Gate, Scorer
from .graph import Graph
from .helpers import COPIED, REFUSED, TRUNCATED, UNANSWERED, UNCHANGED, UNREADABLE, Helpers
from .history import ADOPTED, REJECTED, SAME, History, View, no_history
from .propagators import Propagator, Silent
from .rewriters import Proposal, Rewriter
from .targets import Target, as_text, chosen_params, copied_tasks

RESPONSES = 3  # outputs of a step that the history keeps
NOTE = 2000  # characters of feedback that stand with a candidate
COUNTS = (UNANSWERED, TRUNCATED, UNREADABLE, REFUSED, UNCHANGED, COPIED)


@dataclass(frozen=True)
class Batch:
    """A step's episodes, and the state they were played with."""

    step: int
    state: TeamState
    episodes: Sequence[Episode]

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the episodes, once each."""
        return list({episode.task.id: episode.task for episode in self.episodes}.values())


@dataclass(frozen=True)
class Pieces:
    """What a feedback method is made of.

    Args:
        prompts: the method's prompts by name; the setting `prompts` stands in for some.
        evaluator, propagator, rewriter, view, gate: one of each.
        num_proposals: of a step, at most; the first that passes the gate ends the step.
        start: which candidates' values are rewritten, by the proposals of a step in turn; None:
            those in force. It chooses among candidates that all validation tasks were played with.
    """

    prompts: Mapping[str, str]
    evaluator: Evaluator
    propagator: Propagator
    rewriter: Rewriter
    gate: Gate
    view: View = no_history
    num_proposals: int = 1
    start: Select | None = None


class FeedbackLoop:
    """One step after the other of a feedback method.

    Args:
        config, pieces: the method's settings, and what it is made of.
        spec, rollouts, evaluator, log: of the run.

    Raises `SettingError` at once for params that are not there or that words cannot say.
    """

    def __init__(
        self,
        config: FeedbackConfig,
        pieces: Pieces,
        spec: RunSpec,
        rollouts: RolloutManager,
        evaluator: RunEvaluator,
        log: RunLog,
    ) -> None:
        self.config, self.pieces, self.spec = config, controlled(pieces, config.feedback), spec
        self.rollouts, self.evaluator, self.log = rollouts, evaluator, log
        changed: Any = config.prompts
        self.helpers = Helpers(spec, rollouts, pieces.prompts, changed)
        self.params = chosen_params(spec.system.params(), config.params, (BASE, *spec.policies))
        self.history, self.search = History(), Search("candidates", spec.config.seed)
        for piece in (pieces.evaluator, pieces.propagator, pieces.rewriter):
            if hasattr(piece, "helper"):
                self.helpers.check(piece.helper)

    @property
    def parts(self) -> Sequence[Part]:
        """What a checkpoint holds of it."""
        return (self.history, self.search)

    def targets(self, state: TeamState) -> list[Target]:
        """The params that are rewritten, with their values in this state."""
        values = state.values
        return [Target(p, to_json(values.get(p.name, p.value))) for p in self.params]

    def step(self, step: int, state: TeamState) -> StepResult:
        """A step on the tasks that follow from its number; `state`: the one in force.

        Also one in which every episode fails is learnt from: the error is feedback. What was
        played before under the same values is taken as it is.
        """
        tasks, n = self.rollouts.tasks_of(step), self.config.num_generations
        played = self.rollouts.play(tasks, state, n=n, kind="train", failures_count=True)
        return self.learn(step, state, [episode for episode in played if episode.parent is None])

    def learn(self, step: int, state: TeamState, episodes: Sequence[Episode]) -> StepResult:
        """Judge these episodes of the state in force, take what is said to the params, and adopt
        what the rewriter makes of it if the gate passes it."""
        self.helpers.counts.clear()
        pieces, targets = self.pieces, self.targets(state)
        old = self._in_force(targets)
        batch = Batch(step, state, episodes)
        judged = pieces.evaluator.judge(self.helpers, episodes)
        cases = [
            Case(episode, Graph(episode), judgement)
            for episode, judgement in zip(episodes, judged, strict=True)
        ]
        feedback = pieces.propagator.propagate(self.helpers, cases, targets)
        adopted, verdicts, tried = None, list[str](), 0
        for number in range(pieces.num_proposals):
            shown = self._rewritten(targets, number)
            proposal = pieces.rewriter.propose(self.helpers, shown, feedback, self._past, number)
            tried += 1
            values = self._legal(proposal.values, targets, state)
            if not values:
                continue
            adopted, verdict = self._decide(batch, old, values, proposal, feedback)
            verdicts.append(str(verdict))
            if verdict:
                break
        scores = [j.score for j in judged if not math.isnan(j.score)]
        mean = math.fsum(scores) / len(scores) if scores else None
        row = {
            "judged": len(judged),
            "failed": sum(episode.failed for episode in episodes),
            "feedback": {name: len(own) for name, own in feedback.items()},
            "proposals": tried,
            "adopted": adopted is not None,
            "verdicts": verdicts,
            **{name: self.helpers.counts[name] for name in COUNTS},
        }
        self._say(step, row)
        new = None
        if adopted is not None:  # what stays as it is remains the system's own
            moved = {n: v for n, v in adopted.values.items() if v != old.values[n]}
            new = state.with_values(moved)
        return StepResult({"reward": mean, "text_feedback": row, "policies": {}}, state=new)

    def _say(self, step: int, row: Mapping[str, Any]) -> None:
        lost = ", ".join(f"{row[name]} {name}" for name in COUNTS if row[name])
        verdict = "; ".join(row["verdicts"]) or "no value was proposed"
        self.log.say(f"step {step}: {verdict}" + (f" ({lost})" if lost else ""))

    def _past(self, name: str) -> str:
        return self.pieces.view(self.history.updates, name)

    # candidates

    def _in_force(self, targets: Sequence[Target]) -> Candidate:
        """The candidate whose values are in force; the first one is the start."""
        values = {target.name: target.value for target in targets}
        known = self.search.find(values)
        if known is None:
            proposer = "" if self.search.candidates else "start"
            known = self.search.add(Candidate(values, proposer=proposer))
            return self.search.adopt(known.id, "in force")
        return known

    def _rewritten(self, targets: Sequence[Target], number: int) -> Sequence[Target]:
        """The params with the values that the proposal of this number begins with."""
        ids = [task.id for task in self.spec.val_tasks]
        if self.pieces.start is None or not ids or not self.search.pool(ids):
            return targets
        chosen = self.search.select(self.pieces.start, ids)
        values = chosen[number % len(chosen)].values
        return [replace(target, value=values[target.name]) for target in targets]

    def _legal(
        self, proposed: Mapping[str, Any], targets: Sequence[Target], state: TeamState
    ) -> dict[str, Any]:
        """The proposed values that their params take, and the system takes together; the others are
        counted and warned of."""
        values = dict[str, Any]()
        for target in targets:
            if target.name not in proposed:
                continue
            value = proposed[target.name]
            problem = target.param.problem(value) or self._too_long(value)
            copied = copied_tasks(value, target.value, self.spec.tasks)
            self.helpers.counts[COPIED] += bool(copied)
            if copied:
                problem = problem or (
                    f"it holds training task {copied[0]!r} word for word (copies: refuse)"
                    if self.config.copies == "refuse"
                    else None
                )
                self.log.warn(
                    f"{target.name}: a proposed value holds {len(copied)} training tasks word for"
                    f" word, such as {copied[0]!r}"
                )
            if problem:
                self._refuse(target.name, problem)
            else:
                values[target.name] = value
        if conflict := self.spec.system.conflict({**state.values, **values}):
            self._refuse(", ".join(values), conflict)
            return {}
        return values

    def _refuse(self, name: str, problem: str) -> None:
        self.helpers.counts[REFUSED] += 1
        self.log.warn(f"{name}: a proposed value is refused: {problem}")

    def _too_long(self, value: Any) -> str | None:
        length, most = len(as_text(value)), self.config.max_value_length
        return f"{length} characters, max_value_length is {most}" if length > most else None

    def _decide(
        self,
        batch: Batch,
        old: Candidate,
        values: Mapping[str, Any],
        proposal: Proposal,
        feedback: ByParam,
    ) -> tuple[Candidate | None, Verdict]:
        """The candidate that is in force from now on, None if it stays the old one; and why. The
        proposal becomes part of the history either way."""
        whole = {**old.values, **values}
        known = self.search.find(whole)
        if known is not None and known.id == old.id:
            self.helpers.counts[UNCHANGED] += 1
            new, verdict, status = None, Verdict(False, "unchanged"), SAME
        else:
            new, verdict = self._judged(batch, old, whole, known, feedback)
            status = ADOPTED if verdict else REJECTED
        judged = self.search.find(whole)
        self.history.add(
            batch.step,
            values,
            status,
            score=self._val_score(judged),
            why=str(verdict),
            note=proposal.note,
            feedback=feedback,
            before={name: old.values[name] for name in values},
            responses=[shortened(str(e.output)) for e in batch.episodes[:RESPONSES]],
        )
        return new, verdict

    def _val_score(self, candidate: Candidate | None) -> float:
        """Its mean on the validation tasks; NaN where they were not all played."""
        ids = [task.id for task in self.spec.val_tasks]
        whole = candidate is not None and ids and all(id in candidate.scores for id in ids)
        return mean_over(candidate, ids) if candidate is not None and whole else math.nan

    def _judged(
        self,
        batch: Batch,
        old: Candidate,
        values: Mapping[str, Any],
        known: Candidate | None,
        feedback: ByParam,
    ) -> tuple[Candidate | None, Verdict]:
        if known is not None and known.verdict and not known.adopted:
            return None, Verdict(False, f"rejected before: {known.verdict}")
        rewriter = self.pieces.rewriter
        new = known or self.search.add(
            Candidate(
                values,
                proposer=getattr(rewriter, "helper", type(rewriter).__name__),
                note=_moved_by(feedback)[:NOTE],
                parents=(old.id,),
                round=batch.step,
            )
        )
        own = {param.name: to_json(param.value) for param in self.params}
        scorer = Scorer(self.evaluator, batch.state, self.spec.val_tasks, own)
        verdict = self.pieces.gate.judge(scorer, self.search, new.id, old.id, batch.tasks)
        if not verdict:
            self.search.reject(new.id, verdict)
            return None, verdict
        return self.search.adopt(new.id, verdict), verdict


def controlled(pieces: Pieces, feedback: str) -> Pieces:
    """The pieces of a run with this setting `feedback`: `own`, `shuffled` or `none`."""
    if feedback == "shuffled":
        return replace(pieces, evaluator=Shuffled(pieces.evaluator))
    if feedback == "none":
        return replace(pieces, propagator=Silent(pieces.propagator))
    return pieces


def _moved_by(feedback: ByParam) -> str:
    """What candidates were rewritten by: each text once, after the params that it reached."""
    params: dict[str, list[str]] = {}
    for name, own in feedback.items():
        for each in own:
            names = params.setdefault(each.text, [])
            names += [name] if name not in names else []
    return "\n".join(f"{', '.join(names)}: {text}" for text, names in params.items() if text)
