"""LLM-AutoDiff: feedback on a few errors, several proposals, and a gate of two stages.

Yin and Wang, arXiv:2501.16673 (AdalFlow). A step adds its batch to the tasks since the last success
(`batches: moving`), and learns from at most `max_errors` errors and `max_correct` right answers of
them. Feedback flows edge by edge: an episode with a score above `skip_above` costs no call, a plain
operation that reads one node hands its feedback on, and of an agent that spoke several times the
feedback stands in the order of its calls. `optimizer` is shown the param with its peers, the best
values so far with their scores, and how earlier proposals were made that failed, without their
values. It may propose `num_proposals` times; a proposal replaces the values in force if it is
better on the chosen tasks (or as good, if they were all right), and then strictly better on the
validation tasks, which stop once the old score is out of reach.

Calls of a step with two errors and one agent: 4 of `backward`, 1 to 5 of `optimizer`.

Against the authors' code: every run has a history of its own (there class attributes share it); a
reply without tags changes nothing (there the whole reply becomes the value); feedback keeps its
order, lowest scores first; scores in the history are of the validation tasks; validation stops as
soon as the old score cannot be exceeded (there one task later, when it cannot be reached); the old
values are scored on the chosen tasks at temperature 0, as the new ones are; the newest tasks stay
when `moving_batch` is full (there drawn ones). Not taken over: one call for all predecessors of a
node, demonstrations without a run. With `num_demos` a step also proposes, after the texts,
demonstrations from runs of a `teacher` (values in which it differs from the team), drawn by how
much better it is than the team (`teacher_demos.py`); they have to be strictly better on the
validation tasks, and only successful runs are shown (there failed ones too). With `momentum`
proposals rewrite earlier values, drawn by their scores (TSGD-M, arXiv:2506.00400); they are still
compared with those in force, on all validation tasks.

accelerate launch recipes/llm_autodiff.py [--config recipes/llm_autodiff.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.text.tags import block
from ....agents.types import SettingError, Task
from ....rollouts.types import Episode
from ...config import RunConfig
from ...feedback.config import FeedbackConfig
from ...feedback.evaluators import score_of
from ...feedback.gates import TwoStageGate
from ...feedback.history import Record, best_values, failed_proposals, views
from ...feedback.loop import Pieces
from ...feedback.propagators import PerEdge
from ...feedback.rewriters import PerParam
from ...loop.step_result import StepResult
from ...values.acceptance import GATES
from ...values.memory import Memory
from ...values.parts import Part
from ...values.selection import gumbel_top
from .feedback_trainer import FeedbackTrainer
from .teacher_demos import TeacherDemos, TeacherDemosConfig
from .textual_gradient import TEXTUAL_GRADIENT, GradientConfig

BOLD_AFTER = 3  # steps without success after which the optimizer is asked to be bolder
PROMPTS = {
    **TEXTUAL_GRADIENT,
    "backward_system": (
        TEXTUAL_GRADIENT["backward_system"] + " Reply with at most three sentences of feedback."
    ),
    "rewrite_system": (
        TEXTUAL_GRADIENT["rewrite_system"]
        + " Change it in one of four ways: add an instruction, add an example, rephrase or replace"
        " a part, or delete a part. Use one of six techniques: reasoning step by step, examples, a"
        " clear output format, a role, emphasis on what is missed, or splitting the task. First put"
        " the way, the technique and the reason in a sentence between the tag <METHOD> and its"
        " closing tag."
    ),
    "rewrite": (
        "The variable is {role}. Its value:\n{value}\n\nIts peers, parts of the same"
        " call:\n{peers}\n\nOther variables of the system, which are improved as"
        " well:\n{others}\n\nFeedback on it, lowest scores first, each with the conversation that"
        " it is about:\n{feedback}\n\n{history}\n\nThe new value has to obey these rules (there may"
        " be none):\n{constraints}\n\nImprove the variable by the feedback; try another way than"
        " those that failed. Reply with the sentence between the tag <METHOD> and its closing tag,"
        " and the new value between the tag <IMPROVED_VARIABLE> and its closing tag."
    ),
}


@dataclass
class LLMAutoDiffConfig(TeacherDemosConfig, GradientConfig, FeedbackConfig, RunConfig):
    """`RunConfig` with feedback and a loss in words, proposals, what a step learns from, and
    demonstrations."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/llm_autodiff"
    )
    gate: str = setting(
        "how proposed values have to compare with those in force on the validation tasks",
        "strictly_better",
        choices=GATES,
    )
    first_gate: str = setting(
        "how they have to compare on the chosen tasks of the step, before validation",
        "better_or_perfect",
        choices=GATES,
    )
    num_proposals: int = setting("proposals of a step at most", 5, at_least=1)
    batches: str = setting(
        "what a step learns from: moving (a few errors and right answers of the tasks since the"
        " last success) or whole (its own batch)",
        "moving",
        choices=("moving", "whole"),
    )
    moving_batch: int = setting("tasks since the last success that are kept", 20, at_least=1)
    min_errors: int = setting("of these, errors that are kept at least", 4, at_least=0)
    error_score: float = setting("a task with at most this score is an error", 0.5)
    max_errors: int = setting("errors that a step learns from", 2, at_least=1)
    max_correct: int = setting("right answers that a step learns from", 2, at_least=0)
    skip_above: float | None = setting(
        "an episode whose score is above this is said to be good, without a call; empty: none is",
        0.9,
    )
    best_shown: int = setting("best values that the optimizer is shown", 3, at_least=0)
    failed_shown: int = setting("failed proposals that the optimizer is shown", 5, at_least=0)
    momentum: int = setting(
        "last values that passed or failed the second gate, of which proposals rewrite three drawn"
        " ones in turn (TSGD-M); 0: the values in force are rewritten",
        0,
        at_least=0,
    )
    tasks_per_step: int = setting("tasks that a step plays", 4, at_least=1)

    def check(self) -> None:
        if not self.num_val_tasks:
            raise SettingError(
                "num_val_tasks: 0, but the second stage of the gate compares values on validation"
                " tasks; expected at least 1"
            )
        self.check_demos()


class LLMAutoDiffTrainer(FeedbackTrainer[LLMAutoDiffConfig]):
    """Rewrites the prompts of a team by feedback on errors, with several proposals and two gates.
    Arguments: see `Trainer`."""

    Config = LLMAutoDiffConfig

    def pieces(self) -> Pieces:
        args = self.args
        return Pieces(
            PROMPTS,
            evaluator=args.evaluator(self.spec.metric, args),
            propagator=PerEdge(operations="several", good=args.skip_above, in_call_order=True),
            rewriter=PerParam(constraints=tuple(args.constraints), note="METHOD", scores=True),
            view=views(
                self._boldness, best_values(args.best_shown), failed_proposals(args.failed_shown)
            ),
            gate=TwoStageGate(args.first_gate, args.gate),
            num_proposals=args.num_proposals,
            start=gumbel_top(kept=args.momentum) if args.momentum else None,
        )

    def parts(self) -> Sequence[Part]:
        self.moving = Memory("moving_batch")
        self.moving["tasks"], self.moving["steps_without_success"] = [], 0
        run = self.run
        self.demos = TeacherDemos(self.args, self.spec, run.rollouts, run.evaluator)
        return (*super().parts(), self.moving, self.demos.pool)

    def step(self, step: int) -> StepResult:
        """Play the batch, choose what to learn from, and let the loop judge, propagate, rewrite and
        accept."""
        args, state, rollouts = self.args, self.run.state, self.run.rollouts
        batch = rollouts.tasks_of(step)
        tasks = self._kept(batch)
        n = args.num_generations
        played = rollouts.play(tasks, state, n=n, kind="train", failures_count=True)
        episodes = [episode for episode in played if episode.parent is None]
        scores = task_scores(episodes, self.spec.metric)
        chosen = list(scores)
        if args.batches == "moving":
            chosen = subset(scores, args, random.Random(derive_seed(args.seed, "subset", step)))
        chosen.sort(key=lambda id: scores[id])
        own = [episode for id in chosen for episode in episodes if episode.task.id == id]
        result = self.feedback.learn(step, state, own)
        self._remember(tasks, scores, success=result.state is not None)
        mean = math.fsum(scores.values()) / len(scores) if scores else None
        facts: dict[str, Any] = {"kept": len(self.moving["tasks"]), "chosen": len(chosen)}
        new = result.state
        if args.num_demos:
            shown, facts["demos"] = self.demos.propose(step, new or state, batch, scores)
            new = shown or new
        metrics = {**result.metrics, "reward": mean, "llm_autodiff": facts}
        return dataclasses.replace(result, metrics=metrics, state=new)

    def _kept(self, batch: Sequence[Task]) -> list[Task]:
        """The tasks since the last success, then this batch, each once; what was played before is
        found again."""
        by_id = {task.id: task for task in self.spec.tasks}
        kept = [by_id[id] for id in self.moving["tasks"]]
        return list({task.id: task for task in (*kept, *batch)}.values())

    def _remember(self, tasks: Sequence[Task], scores: Mapping[str, float], success: bool) -> None:
        moving, args = self.moving, self.args
        moving["steps_without_success"] = 0 if success else moving["steps_without_success"] + 1
        keep = args.batches == "moving" and not success
        moving["tasks"] = newest([task.id for task in tasks], scores, args) if keep else []

    def _boldness(self, updates: Sequence[Record], name: str) -> str:
        """How long nothing has improved, for the optimizer."""
        steps = self.moving["steps_without_success"]
        bolder = " Be bolder: make a larger change." if steps > BOLD_AFTER else ""
        return block("STEPS_WITHOUT_SUCCESS", f"{steps}.{bolder}") if steps else ""


def task_scores(episodes: Sequence[Episode], metric: str) -> dict[str, float]:
    """Mean score by id of a task, 0 for episodes that failed; tasks that could not be scored are
    left out."""
    by_task: dict[str, list[float]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task.id, []).append(score_of(episode, metric))
    means = {id: math.fsum(own) / len(own) for id, own in by_task.items()}
    return {id: mean for id, mean in means.items() if not math.isnan(mean)}


def subset(scores: Mapping[str, float], args: LLMAutoDiffConfig, rng: random.Random) -> list[str]:
    """The tasks that a step learns from: at most `max_errors` errors, and at most `max_correct`
    right ones, twice as many as there are errors (2 without errors); drawn."""
    errors = [id for id, score in scores.items() if score <= args.error_score]
    correct = [id for id in scores if id not in set(errors)]
    most = min(args.max_correct, 2 * max(1, len(errors)), len(correct))
    chosen = rng.sample(errors, min(args.max_errors, len(errors)))
    return chosen + rng.sample(correct, most)


def newest(tasks: Sequence[str], scores: Mapping[str, float], args: LLMAutoDiffConfig) -> list[str]:
    """The tasks that are kept, in order: all, or the newest `moving_batch` of them, `min_errors`
    errors at least among them if there are as many."""
    errors = [id for id in tasks if scores.get(id, math.inf) <= args.error_score]
    kept = set(errors[len(errors) - min(args.min_errors, args.moving_batch, len(errors)) :])
    for id in reversed(tasks):
        if len(kept) < args.moving_batch:
            kept.add(id)
    return [id for id in tasks if id in kept]
