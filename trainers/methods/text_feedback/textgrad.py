"""TextGrad: feedback in words flows backward, edge by edge, and rewrites the team's prompts.

Yuksekgonul et al., arXiv:2406.07496. A step plays a batch of tasks, says in words how good each
output is (the metric with the expected output, or a judge), and asks one helper, `backward`, once
per edge of each run's graph: first how the output should be different, then, from each turn that
got feedback, how the turns it read and its own prompt should be. `optimizer` rewrites each prompt
by all that was said of it. The gate compares the new prompts with the old ones on validation tasks.
No weight moves.

Calls of a step with a batch of 3, one agent: 3 of the team, 6 of `backward` (3 from the
judgements, 3 to the prompt), 1 of `optimizer`; with `loss: judge` 3 of `evaluator` besides.

Against the authors' code: a judge's text is propagated by the first-step prompt, which their sum of
empty feedbacks hid; feedback keeps the order of the batch; `optimizer` sees whole values, only
`backward` sees long ones shortened; a reply without tags leaves the prompt as it is and is counted
(there it ends the run); `momentum` reaches the optimizer's prompt (there it does not); the gate is
on by default. Not taken over: in-context examples, values that are images. A new prompt is learnt
here; one answer is refined at test time by the system `agents/patterns/refinement.py`.

accelerate launch recipes/textgrad_prompts.py [--config recipes/textgrad_prompts.yaml]
    [--field value]
"""

from __future__ import annotations

from dataclasses import dataclass

from ....agents.settings import setting
from ...config import RunConfig
from ...feedback.config import FeedbackConfig
from ...feedback.gates import ValidationGate
from ...feedback.history import no_history, past_values
from ...feedback.loop import Pieces
from ...feedback.propagators import PerEdge
from ...feedback.rewriters import PerParam
from .feedback_trainer import FeedbackTrainer
from .textual_gradient import TEXTUAL_GRADIENT, GradientConfig

MOMENTUM = (
    "Earlier values of the variable follow, oldest first. Where successive ones are alike, the"
    " change was too small: make a larger one.\n"
)


@dataclass
class TextGradConfig(GradientConfig, FeedbackConfig, RunConfig):
    """`RunConfig` with feedback and a loss in words, and momentum."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/textgrad_prompts"
    )
    momentum: int = setting(
        "earlier values of a param that the optimizer is shown; 0: none", 0, at_least=0
    )


class TextGradTrainer(FeedbackTrainer[TextGradConfig]):
    """Rewrites the prompts of a team by feedback in words. Arguments: see `Trainer`.

    trainer = TextGradTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["solver"]),
                              tasks="gsm8k", args=TextGradConfig(helpers={"backward": {}, ...}))
    trainer.train()
    """

    Config = TextGradConfig

    def pieces(self) -> Pieces:
        args = self.args
        return Pieces(
            TEXTUAL_GRADIENT,
            evaluator=args.evaluator(self.spec.metric, args),
            propagator=PerEdge(),
            rewriter=PerParam(constraints=tuple(args.constraints)),
            view=past_values(args.momentum, head=MOMENTUM) if args.momentum else no_history,
            gate=ValidationGate(args.gate),
        )
