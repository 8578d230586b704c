"""Refinement of one answer at test time: it is evaluated, criticised and rewritten a few times, and
the majority of all answers is the output.

The solution optimisation of TextGrad (Yuksekgonul et al., arXiv 2406.07496): three iterations of
three calls, then a vote over the first answer and the three rewritten ones. Nothing is learnt; what
comes out is an output like any other, so the system can be trained, or its prompts be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.answers import majority
from ..text.tags import block, inside
from ..text.templates import render
from ..transcript import Operation, Output
from ..types import SettingError, Task, Turn

EVALUATE = (
    "Evaluate this answer to a task. Be critical and concise; do not solve the task.\n{task}\n"
    "{answer}"
)
CRITICISE = (
    "An answer to a task was evaluated. Say how the answer should be different to satisfy the"
    " evaluation; do not write a new one.\n{task}\n{answer}\n{evaluation}"
)
REWRITE = (
    "Improve this answer to a task by the feedback on it. Put the new answer, whole, between the"
    " tag <IMPROVED_VARIABLE> and its closing tag.\n{task}\n{answer}\n{feedback}"
)
FIELDS = {
    "evaluate": ("task", "answer"),
    "criticise": ("task", "answer", "evaluation"),
    "rewrite": ("task", "answer", "feedback"),
}


@trusted("system")
@dataclass
class Refinement(System):
    """Four agents: who solves, who evaluates, who criticises, who rewrites.

    A rewritten answer stands between tags; a reply without them leaves the answer as it is. Every
    question opens a chat of its own.

    Args:
        iterations: evaluations, each with a rewritten answer.
        vote: the output is the majority of all answers (`answers.majority`), else the last one.
        evaluate, criticise, rewrite: the prompts, as templates with the fields `task`, `answer`,
            `evaluation` (in `criticise`) and `feedback` (in `rewrite`): blocks between tags.
    """

    iterations: int = setting("evaluations, each with a rewritten answer", 3, at_least=0)
    vote: bool = setting("the majority of all answers is the output, else the last one", True)
    evaluate: str = EVALUATE
    criticise: str = CRITICISE
    rewrite: str = REWRITE

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) != 4:
            raise SettingError(
                "Refinement: four agents expected (who solves, evaluates, criticises, rewrites),"
                f" got {len(self.specs)}"
            )
        for name, fields in FIELDS.items():
            render(getattr(self, name), dict.fromkeys(fields, ""), setting=name)

    async def run(self, task: Task, team: Team) -> Output:
        solver, evaluator, critic, rewriter = team
        answer: Turn | Operation = await solver.reply(task.prompt)
        answers = [answer]
        for _ in range(self.iterations):
            shown = {"task": block("TASK", task.prompt), "answer": block("ANSWER", answer.text)}
            text = render(self.evaluate, shown, setting="evaluate")
            evaluation = await evaluator.fresh().reply(text, reads=[answer])
            shown["evaluation"] = block("EVALUATION", evaluation.text)
            text = render(self.criticise, shown, setting="criticise")
            feedback = await critic.fresh().reply(text, reads=[answer, evaluation])
            shown["feedback"] = block("FEEDBACK", feedback.text)
            text = render(self.rewrite, shown, setting="rewrite")
            reply = await rewriter.fresh().reply(text, reads=[answer, feedback])
            improved = inside(reply.text, "IMPROVED_VARIABLE")
            if improved:
                answer = team.record("improved answer", improved, reads=[reply])
            answers.append(answer)
        if not self.vote:
            return Output(answer.text, [answer])
        return Output(majority([each.text for each in answers], team.rng), answers)
