"""Operators that solve a problem whole, for a supernet: a direct answer, a vote of several, and a
review with its revision. Others stand in `operators.py`.

After the operators of MaAS (arXiv:2502.04180): I/O, chain of thought (`answer_generate`),
self-consistency and self-refine. Not taken over: debate, ReAct and an ensemble of several models,
which are systems of their own here; your own operator is named `module:NAME`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..concurrency import gather
from ..execution import ProgramError
from ..text.answers import extract, normalise, vote
from .operators import OPERATORS, PROMPTS, Operator, OperatorCall

VOTES = 5  # answers of a vote (MaAS, section 4.1)
TEMPERATURE = 1.0  # of these, in evaluations too: equal answers have no majority
ROUNDS = 2  # reviews of a solution at most
TEMPLATES: Mapping[str, str] = {
    **PROMPTS,
    "generate": "{problem}\n\nEnd with a line `Answer: ` and the answer alone.",
    "self_consistency": PROMPTS["answer_generate"],
    "review": (
        "{problem}\n\nA solution:\n\n{solution}\n\nCheck it. If it is right, reply `RIGHT` alone;"
        " otherwise say what is wrong with it, and why."
    ),
}


def most_common(texts: Iterable[str]) -> str:
    """The text whose answer most of the texts give; of several the first. "" of none."""
    votes: dict[str, list[str]] = {}
    for text in texts:
        answer = vote(text)
        votes.setdefault(normalise(text if answer is None else answer), []).append(text)
    return max(votes.values(), key=len)[0] if votes else ""


async def generate(call: OperatorCall) -> str:
    """A direct answer to the problem, without thinking aloud."""
    text = await call.ask({}, [])
    return extract(text) or text


async def self_consistency(call: OperatorCall) -> str:
    """The answer that most of several independent answers give, each thought out step by step."""
    texts = await gather(
        call.ask({}, [], temperature=TEMPERATURE) for _ in range(call.operator.calls)
    )
    return most_common(extract(text) or text for text in texts)


async def self_refine(call: OperatorCall, solution: str) -> str:
    """An earlier solution, reviewed and written again until the review finds nothing wrong."""
    for _ in range(call.operator.calls // 2):
        said = await call.ask({"solution": solution}, [solution], template="review")
        if said.strip().strip(".*`").upper() == "RIGHT":
            break
        fields = {"solution": solution, "feedback": said}
        solution = await call.ask(fields, [solution, said], template="revise")
    if not solution.strip():
        raise ProgramError("self_refine: the revised solution is empty")
    return solution


SOLVERS: Mapping[str, Operator] = {
    **{name: OPERATORS[name] for name in ("answer_generate", "ensemble", "programmer", "test")},
    "generate": Operator(generate, 1, lambda: "1"),
    "self_consistency": Operator(self_consistency, VOTES, lambda: "1"),
    "self_refine": Operator(self_refine, 2 * ROUNDS, lambda solution: solution),
}
