"""REVOLVE: TextGrad whose optimizer sees how the values have evolved.

Zhang et al., arXiv:2412.03092. Play, judgement and backward pass are TextGrad's (`textgrad.py`),
and so is the number of calls. The optimizer is also shown all values that the param had after
earlier updates, and is asked to change it gradually, to take values that stay nearly the same for
a change that was too small, and to vary its wording: the paper's second-order term, in words.

Against the authors' code: a value that the gate rejected is marked so in the list; `window` bounds
the list, which grows without bound there (0, the default, keeps that); with `track: responses` the
list also holds outputs of the team under each value, as the paper speaks of responses where the
code lists values. A reply without either pair of tags changes nothing and adds nothing to the list.

accelerate launch recipes/revolve.py [--config recipes/revolve.yaml] [--field value]
"""

from __future__ import annotations

from dataclasses import dataclass

from ....agents.settings import setting
from ...config import RunConfig
from ...feedback.config import FeedbackConfig
from ...feedback.gates import ValidationGate
from ...feedback.history import past_values
from ...feedback.loop import Pieces
from ...feedback.propagators import PerEdge
from ...feedback.rewriters import PerParam
from .feedback_trainer import FeedbackTrainer
from .textual_gradient import TEXTUAL_GRADIENT, GradientConfig

NO_VALUES = "There are no past iterations yet."
PROMPTS = {
    **TEXTUAL_GRADIENT,
    "rewrite_system": (
        TEXTUAL_GRADIENT["rewrite_system"]
        + " Consider how the variable has evolved over past iterations. Make gradual, thoughtful"
        " changes. If recent values are nearly the same, the changes were too small: make a larger"
        " one. Reply with the new value alone."
    ),
    "rewrite": (
        TEXTUAL_GRADIENT["rewrite"]
        + "\nDo not repeat an earlier value: let the new one be unlike those before in wording and"
        " approach."
    ),
}


@dataclass
class RevolveConfig(GradientConfig, FeedbackConfig, RunConfig):
    """`RunConfig` with feedback and a loss in words, and what the optimizer sees of the past."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/revolve"
    )
    window: int = setting("past values that the optimizer is shown; 0: all", 0, at_least=0)
    track: str = setting(
        "what the list of past iterations holds: values, or responses of the team as well",
        "values",
        choices=("values", "responses"),
    )


class RevolveTrainer(FeedbackTrainer[RevolveConfig]):
    """Rewrites the prompts of a team by feedback in words and their own history. Arguments: see
    `Trainer`."""

    Config = RevolveConfig

    def pieces(self) -> Pieces:
        args = self.args
        responses = args.track == "responses"
        return Pieces(
            PROMPTS,
            evaluator=args.evaluator(self.spec.metric, args),
            propagator=PerEdge(),
            rewriter=PerParam(
                constraints=tuple(args.constraints), tags=("IMPROVED_VARIABLE", "VARIABLE")
            ),
            view=past_values(args.window, responses=responses, none=NO_VALUES),
            gate=ValidationGate(args.gate),
        )
