"""Refinement of MAS-GPT: a helper fits the assigned system to one query and says why it suits; a
gate keeps what is not worse (arXiv:2503.03686).

The helper sees the query and the system, never the answer or a score. It may rewrite the texts of
the system and nothing else: what it changes in the calls is refused. A refused or worse rewriting
leaves the system as it was, with the helper's reasoning; a reply without reasoning leaves the query
out.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from .....agents.execution import program_in
from .....agents.programs.program import Program
from .....agents.programs.restrictions import parsed
from .....agents.team import Team
from .....agents.text.tags import block, inside
from .....agents.text.templates import render
from .....agents.types import Task, Turn
from .....rollouts.types import Episode
from ...workflow_search.proposals import DRY_RUN, ProgramTalk, Proposal

PROGRAMS = "programs"  # the value of `ProgramByQuery`
REFINE = """A multi-agent system is a Python program that answers a query by calling functions, \
each of which asks an agent:

{operators}

This system was chosen for this query:

{system}

{query}

Rewrite the texts of the system, such as roles and instructions of its agents, so that they fit \
the query. Keep everything else: which functions are called, in which order, and how often. Do not \
solve the query, and write no result into the program. Then say in a few sentences how the query \
leads to this system. Reply with both, between these tags:
<REASONING>
...
</REASONING>
<PROGRAM>
...
</PROGRAM>"""


@dataclass
class Refinement(ProgramTalk):
    """One agent, which fits the program of `target` to a query."""

    async def run(self, task: Task, team: Team) -> Turn:
        assert self.target is not None
        (agent,) = team
        turn = await agent.reply(task.prompt)
        await self.check(read_refinement(turn.text, self.target.program), turn, team)
        return turn


@dataclass
class ProgramByQuery(Program):
    """Executors, and a program for each query: the value `programs`, by task id."""

    def program_for(self, task: Task, team: Team) -> str:
        programs: Mapping[str, str] = team.values[PROGRAMS]
        return programs[task.id]


def refinement_task(task: Task, target: Program, template: str = REFINE) -> Task:
    """What the helper is asked about one query: fields `operators`, `system` and `query` of the
    template. Nothing in the query or the program can close or open their blocks."""
    fields = {
        "operators": "\n".join(f"- {each}" for each in target.callable.values()),
        "system": block("SYSTEM", target.program),
        "query": block("QUERY", task.prompt),
    }
    return Task(task.id, render(template, fields, setting="refinement"))


def read_refinement(reply: str, base: str) -> Proposal:
    """Reasoning (`note`) and program of a reply; the fault says why the program is refused."""
    reasoning = inside(reply, "REASONING") or ""
    program = program_in(inside(reply, "PROGRAM") or "")
    if not reasoning or not program:
        missing = "PROGRAM" if reasoning else "REASONING"
        return Proposal(reasoning, program, f"missing: <{missing}>")
    try:
        same = structure(program) == structure(base)
    except SyntaxError as error:
        return Proposal(reasoning, program, f"syntax: {' '.join(str(error).split())[:120]}")
    fault = "" if same else "structure: it differs from its system in more than texts"
    return Proposal(reasoning, program, fault)


def refinement_of(episode: Episode, base: str) -> Proposal:
    """The proposal of a `Refinement`, with the fault that its dry run showed."""
    if episode.error is not None or episode.output is None:
        return Proposal("", fault=f"reply: {episode.error or 'none'}")
    proposal = read_refinement(episode.output, base)
    faults = [each.error for each in episode.operations if each.name == DRY_RUN]
    return Proposal(proposal.note, proposal.program, faults[-1])


def structure(program: str) -> str:
    """A program without its texts: two with the same calls in the same places are equal. Raises
    `SyntaxError`."""
    tree = parsed(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def accepted(base: float, refined: float) -> bool:
    """Whether a refined system takes the place of its base, by their scores on the query: unless it
    is worse. Two that both fail are equal (the paper's rule)."""
    return refined >= base
