"""Refinement of one answer at test time: it is evaluated, criticised and rewritten a few times, and
the majority of all answers, or the last one, is the output.

The solution optimisation of TextGrad (Yuksekgonul et al., arXiv:2406.07496): three iterations of
three calls, then a vote over the first answer and the three rewritten ones. With `roles` and
without a vote it is that of AIME (arXiv:2410.03131): an answer, such as a program, is evaluated
once per role. Nothing is learnt; what comes out is an output like any other, so the system can be
trained, or its prompts be learnt. Every answer but the first stands on record as the operation
`improved answer`.

Against AIME's code: each evaluation stands under its role; the answer of the last iteration is the
output (there it is thrown away, so 10 iterations here come to what 11 come to there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..chat import Agent
from ..concurrency import gather
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
ONLY = "\nLook at one thing alone and say nothing about any other: {criterion}."
CRITERIA = {
    "logic": "logic: whether the steps follow from one another and lead to what is asked",
    "syntax": "syntax: whether it is well-formed and can be read or run as it stands",
    "readability": "readability: whether it is clear to others",
    "redundancy": "redundancy: whether anything in it is repeated or without use",
    "correctness": "correctness: whether it is right, special cases included",
    "runtime": "runtime: whether it takes more time or space than it has to",
}
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
        roles: an answer is evaluated once for each, at once: names of `CRITERIA`, or words of your
            own; none: once.
        evaluation_tokens: of all evaluations of an answer together, shared evenly.
        vote: the output is the majority of all answers (`answers.majority`), else the last one.
        evaluate, criticise, rewrite: the prompts, as templates with the fields `task`, `answer`,
            `evaluation` (in `criticise`) and `feedback` (in `rewrite`): blocks between tags.
    """

    iterations: int = setting("evaluations, each with a rewritten answer", 3, at_least=0)
    roles: Sequence[str] = ()
    evaluation_tokens: int = setting(
        "tokens of all evaluations of an answer together; 0: each has the evaluator's own bound",
        0,
        at_least=0,
    )
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
        if self.evaluation_tokens and self.evaluation_tokens < len(self.roles):
            raise SettingError(
                f"evaluation_tokens: {self.evaluation_tokens} shared by {len(self.roles)} roles"
                " leave none; expected at least one token for each"
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
            evaluations = await self._evaluations(evaluator, text, answer)
            shown["evaluation"] = block("EVALUATION", self._joined(evaluations))
            text = render(self.criticise, shown, setting="criticise")
            feedback = await critic.fresh().reply(text, reads=[answer, *evaluations])
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

    async def _evaluations(
        self, evaluator: Agent, text: str, answer: Turn | Operation
    ) -> list[Turn]:
        """One per role, in the order of roles; each a chat of its own, asked at once."""
        roles = self.roles or ("",)
        sampling = evaluator.sampling
        if self.evaluation_tokens:
            sampling = replace(sampling, max_tokens=self.evaluation_tokens // len(roles))
        return await gather(
            evaluator.fresh().reply(
                text + (ONLY.format(criterion=CRITERIA.get(role, role)) if role else ""),
                reads=[answer],
                sampling=sampling,
            )
            for role in roles
        )

    def _joined(self, evaluations: Sequence[Turn]) -> str:
        """Their texts, each under its role; one that says nothing is left out."""
        roles = self.roles or ("",)
        return "\n\n".join(
            f"{role}: {turn.text}" if role else turn.text
            for role, turn in zip(roles, evaluations, strict=True)
            if turn.text.strip() or not role
        )
