"""MAS-GPT: a designer answers a query with reasoning and one program, which is a whole multi-agent
system; the program is run once, and its answer is the team's.

The system of MAS-GPT (Ye et al., arXiv:2503.03686). The program stands in the last block fenced as
Python. A reply without one is answered by a fallback, and so is a program that runs out of time;
one that breaks a rule or fails in its run has no answer, which scores 0. Nothing is missing from
an evaluation: the designer's rewards `valid` and `ran` say what became of its program, and the
operation `fallback` that another one gave the answer.

Against the authors' code: a program calls operators (`operators.py`) instead of a client of its
own, and runs in the sandbox; a failed generation is a reply without a program; a run without an
answer counts 0 instead of leaving its query out; a time-out does not replace the program on record.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..lookup import trusted
from ..settings import setting
from ..team import Team
from ..types import SettingError, Task, Turn
from .program import Program
from .workflow import Design, Workflow, answer_of, failed

FALLBACK = """THINK = "Think step by step, then end with a line `Answer: ` and the answer alone."
DECIDE = "Several solutions of this problem are given. Compare them, then decide."
solutions = [await custom(THINK) for _ in range(5)]
await custom(DECIDE + "\\n\\n" + "\\n\\n".join(solutions) + "\\n\\n" + THINK)"""
GENERATION_COST = 0.5  # of a designer's reply, in calls of executors (arXiv:2503.03686)
FELL_BACK = "fallback"  # the operation
INSTRUCTION = """You generate multi-agent systems. Write a Python program that answers the query \
below by calling these functions, each of which asks an agent:

{operators}

`problem` holds the text of the query, and every function sees it. Loops, conditions, \
asyncio.gather and functions of your own are allowed; files, other modules and new functions of a \
language model are not. The value of the last line, an expression, is the answer. An example:

```python
{template}
```

First say which system suits the query and why, then write the program as one block fenced as \
Python. The query:
{prompt}"""


@trusted("system")
@dataclass
class MASGPT(Workflow):
    """A designer that writes one program for each query, and its executors. Settings of `Workflow`
    with other defaults:

    Args:
        tag: the fence of the block that holds the program.
        fallback: the program for a reply without one, and after a time-out; "" runs nothing. The
            default asks five times and then for a decision: six calls of executors.
        instruction: the designer's prompt; fields `prompt`, `operators`, `template`.
    """

    instruction: str = INSTRUCTION
    tag: str = "```python"
    fallback: str = FALLBACK
    attempts: int = setting("programs that the designer may write: one", 1, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attempts > 1:
            raise SettingError(
                f"attempts: MAS-GPT generates once, got {self.attempts}; leave it out, and set"
                " fallback"
            )

    async def run(self, task: Task, team: Team) -> str:
        turn = await team[self.designer].fresh().reply(self.instructed(task))
        design = await self.read(turn, team)
        if not design.program:
            return await self.fall_back(task, turn, team)
        if design.fault:
            return ""
        outcome = await self.perform(design, task, team)
        if outcome.status == "time":
            return await self.fall_back(task, turn, team)
        return answer_of(outcome)

    async def fall_back(self, task: Task, turn: Turn, team: Team) -> str:
        """The answer of the fallback in place of the program that `turn` should hold; "" without
        one."""
        if not self.fallback:
            return ""
        outcome = await self.perform(Design(self.fallback), task, team)
        answer = answer_of(outcome)
        team.record(FELL_BACK, answer, reads=(turn,), error=failed(outcome))
        return answer


def executing_team(system: Workflow, program: str, of: type[Program] = Program) -> Program:
    """The executors of a workflow with one program for every query, under the same rules and
    bounds. `of`: the class of the team."""
    executors = [spec for spec in system.specs if spec.name != system.designer]
    return of(
        executors,
        program=program,
        operators=system.operators,
        executors=system.executors,
        prompts=system.prompts,
        banned=system.banned,
        max_nodes=system.max_nodes,
        max_chars=system.max_chars,
        max_calls=system.max_calls,
        max_text=system.max_text,
        seconds=system.seconds,
    )


def call_cost(generations: int, calls: int) -> float:
    """What an answer costs in calls of executors: a generation counts half of one."""
    return GENERATION_COST * generations + calls
