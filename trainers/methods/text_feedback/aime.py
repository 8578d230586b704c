"""AIME: several judges with a role each say what is wrong, and the prompts are rewritten by all of
it.

arXiv:2410.03131. Play, backward pass and rewriting are TextGrad's (`textgrad.py`); only the loss is
another one. `evaluator` is asked once per role and output, all at once and each for itself; the
judges share `evaluator_tokens` evenly, and what they say is joined in the order of `roles`. A judge
that gives no answer is counted and does not drop the others. The baseline with one judge for all
criteria is one role that names them: `roles: ["logic, syntax and runtime"]`.

Calls of a step with a batch of 3, one agent, K roles: 3 of the team, 3 K of `evaluator`, 6 of
`backward`, 1 of `optimizer`.

Against the authors' code: each judge's text stands under its role (there they are run together);
replies that ended at their share are counted (`truncated`; there nothing tells); any list of roles
works (there eight); the gate is on by default, and `gate: always` is theirs. Their programs for one
problem are refined at test time by the system `agents/patterns/refinement.py` with `roles`
(`recipes/aime_programs.yaml`); here the prompts of a team are learnt by the same judges.

accelerate launch recipes/aime.py [--config recipes/aime.yaml] [--field value]
"""

from __future__ import annotations

from dataclasses import dataclass

from ....agents.patterns.refinement import CRITERIA
from ....agents.settings import setting
from ....agents.types import SettingError
from ...config import RunConfig
from ...feedback.config import FeedbackConfig
from ...feedback.evaluators import Judges
from ...feedback.gates import ValidationGate
from ...feedback.loop import Pieces
from ...feedback.propagators import PerEdge
from ...feedback.rewriters import PerParam
from .feedback_trainer import FeedbackTrainer
from .textual_gradient import TEXTUAL_GRADIENT

PROMPTS = {
    **TEXTUAL_GRADIENT,
    "judge_system": TEXTUAL_GRADIENT["judge_system"] + " Be very concise.",
    "judge": (
        TEXTUAL_GRADIENT["judge"]
        + " Look at one thing alone and say nothing about any other: {criterion}."
    ),
}


@dataclass
class AIMEConfig(FeedbackConfig, RunConfig):
    """`RunConfig` with feedback in words, and the judges."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/aime"
    )
    roles: list[str] = setting(
        "what the judges look at, one each: logic, syntax, readability, redundancy, correctness,"
        " runtime, or words of your own",
        factory=lambda: list(CRITERIA),
    )
    evaluator_tokens: int = setting(
        "tokens that all judges of an output may say together, shared evenly", 3600, at_least=1
    )
    constraints: list[str] = setting("rules that a new value has to obey", factory=list)
    show_answer: bool = setting(
        "judges are shown the tasks' answers (their turns are then never trained on)", False
    )

    def check(self) -> None:
        if not self.roles or len(set(self.roles)) < len(self.roles) or "" in self.roles:
            raise SettingError(f"roles: expected different ones, at least one, got {self.roles}")
        if self.evaluator_tokens < len(self.roles):
            raise SettingError(
                f"evaluator_tokens: {self.evaluator_tokens} shared by {len(self.roles)} roles leave"
                " none; expected at least one token for each"
            )


class AIMETrainer(FeedbackTrainer[AIMEConfig]):
    """Rewrites the prompts of a team by what several judges say. Arguments: see `Trainer`."""

    Config = AIMEConfig

    def pieces(self) -> Pieces:
        args = self.args
        return Pieces(
            PROMPTS,
            evaluator=Judges(
                self.spec.metric,
                roles=tuple(args.roles),
                criteria=CRITERIA,
                max_tokens=args.evaluator_tokens,
                show_answer=args.show_answer,
            ),
            propagator=PerEdge(),
            rewriter=PerParam(constraints=tuple(args.constraints)),
            gate=ValidationGate(args.gate),
        )
