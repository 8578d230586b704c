"""Base of the methods of feedback in words: a method names its pieces, the loop takes its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from ...feedback.loop import FeedbackLoop, Pieces
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.parts import Part

C = TypeVar("C", bound=Any)  # a FeedbackConfig that is a RunConfig too


class FeedbackTrainer(Trainer[C]):
    """Rewrites params of a team by feedback in words (`trainers/feedback/loop.py`). Arguments: see
    `Trainer`."""

    def pieces(self) -> Pieces:
        """What the method is made of."""
        raise NotImplementedError(f"{type(self).__name__} names no pieces")

    def parts(self) -> Sequence[Part]:
        run = self.run
        self.feedback = FeedbackLoop(
            self.args, self.pieces(), self.spec, run.rollouts, run.evaluator, run.log
        )
        return self.feedback.parts

    def step(self, step: int) -> StepResult:
        """Play a batch, judge it, take the feedback to the params, rewrite them, accept."""
        return self.feedback.step(step, self.run.state)
