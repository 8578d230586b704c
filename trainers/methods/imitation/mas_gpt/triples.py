"""Triples of MAS-GPT: query, reasoning and program, as they are learnt and as they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .....agents.execution import closed
from .....agents.programs.workflow import Workflow
from .....agents.text.templates import render
from .....agents.types import Message, Task, Turn
from .....rollouts.types import Episode, TurnKey
from ...workflow_search.proposals import Proposal
from .refinement import accepted

REPLY = "{reasoning}\n\n```python\n{program}\n```"


@dataclass(frozen=True)
class Triple:
    """What a designer is to write for one query.

    Args:
        query: the task's id. source: the task's. split: `train`, or `val` for those whose loss is
            only measured.
        cluster: of the query. system: its name in the pool.
        reasoning, program: what is learnt.
        base: score of the system on the query, 0 or 1. refined: of the rewritten one; None where
            nothing was rewritten.
        accepted: the program is the rewritten one.
        fault: why a rewriting was refused before it was scored.
    """

    query: str
    source: str
    split: str
    cluster: str
    system: str
    reasoning: str
    program: str
    base: int
    refined: int | None = None
    accepted: bool = False
    fault: str = ""

    @property
    def score(self) -> int:
        """Of the program that is learnt, on its query."""
        return self.base if self.refined is None or not self.accepted else self.refined


def with_proposal(triple: Triple, proposal: Proposal, score: int | None) -> Triple:
    """The triple with a helper's reasoning and, unless it is worse than the system, its program.
    `score`: of the program on the query, None where it was not scored."""
    told = replace(triple, reasoning=proposal.note, fault=proposal.fault)
    if score is None:
        return told
    if not accepted(triple.base, score):
        return replace(told, refined=score)
    return replace(told, program=proposal.program, refined=score, accepted=True)


def reply_of(template: str, reasoning: str, program: str) -> str:
    """The text that the designer learns to write."""
    fields = {"reasoning": closed(reasoning), "program": program}
    return render(template, fields, setting="reply").strip("\n")


def lesson(
    triple: Triple,
    task: Task,
    step: int,
    system: Workflow,
    opening: Sequence[Message],
    template: str = REPLY,
) -> Episode:
    """The triple as an episode of one written turn: the designer's own prompt for the query, and
    the text. `opening`: the messages at the head of the designer's chats."""
    messages = (*opening, Message("user", system.instructed(task)))
    text = reply_of(template, triple.reasoning, triple.program)
    turn = Turn(0, system.designer, messages, source="written", text=text)
    name = f"triple-{step:06d}/{task.id}"
    return Episode(name, name, task.public(), step=step, turns=(turn,))


def weights(lessons: Sequence[Episode]) -> Mapping[TurnKey, float]:
    """Every lesson counts alike: weight 1 by turn."""
    return {(each.id, turn.index, turn.sibling): 1.0 for each in lessons for turn in each.turns}
