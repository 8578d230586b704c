"""Feedback in words: play, judge, propagate, rewrite, accept. One loop for the methods of
`trainers/methods/text_feedback/`.

A method is a page: its settings, its prompts, and one of each

    evaluator   (`evaluators.py`)   RuleWords | Judges                 an episode -> a Judgement
    propagator  (`propagators.py`)  PerEdge | PerNode | Requirements | WholeGraph
                                                                judgements -> Feedback by param
    rewriter    (`rewriters.py`)    PerParam | Jointly         feedback -> a Proposal of values
    view        (`history.py`)      no_history | past_values | best_values | failed_proposals |
                                    last_updates | views(...)   what the rewriter sees of the past
    gate        (`gates.py`)        ValidationGate | TwoStageGate      does the proposal replace
                                                                       the values in force?

    class MyTrainer(Trainer[MyConfig]):
        Config = MyConfig

        def parts(self):
            self.feedback = FeedbackLoop(
                self.args, self.run, PROMPTS, evaluator=RuleWords(self.spec.metric),
                propagator=PerEdge(), rewriter=PerParam(), view=no_history,
                gate=ValidationGate(self.args.gate),
            )
            return self.feedback.parts

        def step(self, step):
            return self.feedback.step(step)

A new kind of any of them is a class with the one method of its protocol; it asks helpers through
`Helpers.ask`, so its calls are recorded, metered and replayed on resume, and takes its prompts from
`Helpers.prompt`, so that a setting (`prompts`) can change them. A method that draws its own tasks,
or keeps errors, gives the step's episodes to `FeedbackLoop.learn` itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...agents.text.tags import shortened
from ...agents.types import to_json
from ...rollouts.types import Episode
from ..loop.run import TrainingRun
from ..loop.step_result import StepResult
from ..values.acceptance import Verdict
from ..values.parts import Part
from ..values.search import Candidate, Search
from .backward import ByParam, Case
from .config import FeedbackConfig
from .evaluators import Evaluator
from .gates import Gate
from .graph import Graph
from .helpers import COPIED, REFUSED, UNANSWERED, UNCHANGED, UNREADABLE, Helpers
from .history import ADOPTED, REJECTED, SAME, History, View
from .propagators import Propagator
from .rewriters import Proposal, Rewriter
from .targets import Target, chosen_params, copied_tasks

RESPONSES = 3  # outputs of a step that the history keeps
NOTE = 2000  # characters of feedback that stand with a candidate
COUNTS = (UNANSWERED, UNREADABLE, REFUSED, UNCHANGED, COPIED)


class FeedbackLoop:
    """One step after the other of a feedback method.

    Args:
        config, run: the method's settings and its run.
        prompts: the method's prompts by name; the setting `prompts` stands in for some.
        evaluator, propagator, rewriter, view, gate: one of each.
        num_proposals: of a step, at most; the first that passes the gate ends the step.

    Raises `SettingError` at once for params that are not there or that words cannot say.
    """

    def __init__(
        self,
        config: FeedbackConfig,
        run: TrainingRun,
        prompts: Mapping[str, str],
        *,
        evaluator: Evaluator,
        propagator: Propagator,
        rewriter: Rewriter,
        view: View,
        gate: Gate,
        num_proposals: int = 1,
    ) -> None:
        self.config, self.run = config, run
        self.evaluator, self.propagator, self.rewriter = evaluator, propagator, rewriter
        self.view, self.gate, self.num_proposals = view, gate, num_proposals
        changed: Any = config.prompts
        self.helpers = Helpers(run.spec, run.rollouts, prompts, changed)
        self.params = chosen_params(run.spec.system.params(), config.params)
        self.history, self.search = History(), Search("candidates", config.seed)
        for part in (evaluator, propagator, rewriter):
            if hasattr(part, "helper"):
                self.helpers.check(part.helper)

    @property
    def parts(self) -> Sequence[Part]:
        """What a checkpoint holds of it."""
        return (self.history, self.search)

    @property
    def targets(self) -> list[Target]:
        """The params that are rewritten, with their values in force."""
        values = self.run.state.values
        return [Target(p, to_json(values.get(p.name, p.value))) for p in self.params]

    def step(self, step: int) -> StepResult:
        """A step on the tasks that follow from its number.

        Also one in which every episode fails is learnt from: the error is feedback. What was
        played before under the same values is taken as it is.
        """
        rollouts = self.run.rollouts
        tasks, n = rollouts.tasks_of(step), self.config.num_generations
        played = rollouts.play(tasks, n=n, kind="train")
        return self.learn(step, [episode for episode in played if episode.parent is None])

    def learn(self, step: int, episodes: Sequence[Episode]) -> StepResult:
        """Judge these episodes of the values in force, take what is said to the params, and adopt
        what the rewriter makes of it if the gate passes it."""
        self.helpers.counts.clear()
        old, targets = self._in_force(), self.targets
        judged = self.evaluator.judge(self.helpers, episodes)
        cases = [
            Case(episode, Graph(episode), judgement)
            for episode, judgement in zip(episodes, judged, strict=True)
        ]
        feedback = self.propagator.propagate(self.helpers, cases, targets)
        adopted, verdicts, tried = None, list[str](), 0
        for number in range(self.num_proposals):
            proposal = self.rewriter.propose(self.helpers, targets, feedback, self._past, number)
            tried += 1
            values = self._legal(proposal.values, targets)
            if not values:
                continue
            adopted, verdict = self._decide(step, old, values, proposal, feedback, episodes)
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
        state = None
        if adopted is not None:  # what stays as it is remains the system's own
            moved = {n: v for n, v in adopted.values.items() if v != old.values[n]}
            state = self.run.state.with_values(moved)
        return StepResult({"reward": mean, "text_feedback": row, "policies": {}}, state=state)

    def _say(self, step: int, row: Mapping[str, Any]) -> None:
        lost = ", ".join(f"{row[name]} {name}" for name in COUNTS if row[name])
        verdict = "; ".join(row["verdicts"]) or "no value was proposed"
        self.run.log.say(f"step {step}: {verdict}" + (f" ({lost})" if lost else ""))

    def _past(self, name: str) -> str:
        return self.view(self.history.updates, name)

    # candidates

    def _in_force(self) -> Candidate:
        """The candidate whose values are in force; the first one is the start."""
        values = {target.name: target.value for target in self.targets}
        known = self.search.find(values)
        if known is None:
            proposer = "" if self.search.candidates else "start"
            known = self.search.add(Candidate(values, proposer=proposer))
            return self.search.adopt(known.id, "in force")
        return known

    def _legal(self, proposed: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
        """The proposed values that their params take; the others are counted and warned of."""
        values = {}
        for target in targets:
            if target.name not in proposed:
                continue
            value = proposed[target.name]
            problem = target.param.problem(value) or self._too_long(value)
            copied = copied_tasks(value, target.value, self.run.spec.tasks)
            self.helpers.counts[COPIED] += bool(copied)
            if copied:
                problem = problem or (
                    f"it holds training task {copied[0]!r} word for word (copies: refuse)"
                    if self.config.copies == "refuse"
                    else None
                )
                self.run.log.warn(
                    f"{target.name}: a proposed value holds {len(copied)} training tasks word for"
                    f" word, such as {copied[0]!r}"
                )
            if problem:
                self.helpers.counts[REFUSED] += 1
                self.run.log.warn(f"{target.name}: a proposed value is refused: {problem}")
            else:
                values[target.name] = value
        return values

    def _too_long(self, value: Any) -> str | None:
        length, most = len(value) if isinstance(value, str) else 0, self.config.max_value_length
        return f"{length} characters, max_value_length is {most}" if length > most else None

    def _decide(
        self,
        step: int,
        old: Candidate,
        values: Mapping[str, Any],
        proposal: Proposal,
        feedback: ByParam,
        episodes: Sequence[Episode],
    ) -> tuple[Candidate | None, Verdict]:
        """The candidate that is in force from now on, None if it stays the old one; and why. The
        proposal becomes part of the history either way."""
        whole = {**old.values, **values}
        known = self.search.find(whole)
        if known is not None and known.id == old.id:
            self.helpers.counts[UNCHANGED] += 1
            new, verdict, status = None, Verdict(False, "unchanged"), SAME
        else:
            new, verdict = self._judged(step, old, whole, known, feedback, episodes)
            status = ADOPTED if verdict else REJECTED
        judged = self.search.find(whole)
        self.history.add(
            step,
            values,
            status,
            score=judged.mean if judged is not None and judged.scores else math.nan,
            why=str(verdict),
            note=proposal.note,
            feedback=feedback,
            responses=[shortened(str(e.output)) for e in episodes[:RESPONSES]],
        )
        return new, verdict

    def _judged(
        self,
        step: int,
        old: Candidate,
        values: Mapping[str, Any],
        known: Candidate | None,
        feedback: ByParam,
        episodes: Sequence[Episode],
    ) -> tuple[Candidate | None, Verdict]:
        if known is not None and known.verdict and not known.adopted:
            return None, Verdict(False, f"rejected before: {known.verdict}")
        new = known or self.search.add(
            Candidate(
                values,
                proposer=getattr(self.rewriter, "helper", type(self.rewriter).__name__),
                note="\n".join(f.text for own in feedback.values() for f in own)[:NOTE],
                parents=(old.id,),
                round=step,
            )
        )
        batch = list({episode.task.id: episode.task for episode in episodes}.values())
        verdict = self.gate.judge(self.run, self.search, new.id, old.id, batch)
        if not verdict:
            self.search.reject(new.id, verdict)
            return None, verdict
        return self.search.adopt(new.id, verdict), verdict
