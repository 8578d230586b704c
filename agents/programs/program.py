"""One program for every task: it calls operators, which executor agents answer.

The program is the value `program` of the team's state, so a method can search for a better one
(AFlow, arXiv:2410.10762; ADAS, arXiv:2408.08435) and a checkpoint keeps it. It is plain text that
runs in the sandbox alone: prompts as constants on top, then the calls. How a run ended stands in
the episode's operation `program`: its text is the answer, its `error` why there is none.

    Program(["executor"], program='await custom("Think step by step, then answer.")')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..execution import Limits
from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..transcript import Output
from ..types import SettingError, Task
from .operators import OPERATORS, OperatorContext, resolve_operators
from .restrictions import ENTRY, Restrictions, parsed
from .workflow import TEMPLATE, answer_of, check_executors, dry_run, failed, run_program

PROGRAM = "program"  # the name of the param, and of the operation


@trusted("system")
@dataclass
class Program(System):
    """Executors, and the program that calls them. All agents are executors.

    Args:
        program: the one in force while `values` has none.
        operators: what programs may call: names of `OPERATORS`, or `module:NAME` of your own.
        executors: agent by operator; "" names the one for all others, by default the first agent.
        prompts: templates by operator, in place of `operators.PROMPTS`.
        banned, max_nodes, max_chars: see `Restrictions`. AFlow bounds the nodes by 10.
        max_calls: calls of executors for one task. max_tokens: tokens of their prompts and replies
            after which none is called any more. max_text: characters that an operator takes, and
            of the answer. seconds: of computing for one task.
    """

    program: str = TEMPLATE
    operators: Sequence[str] = tuple(OPERATORS)
    executors: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    banned: Sequence[str] = ()
    max_nodes: int = setting("calls of operators in a program", 10, at_least=1)
    max_chars: int = setting("characters of a program", 8000, at_least=1)
    max_calls: int = setting("calls of executors for one task", 20, at_least=1)
    max_tokens: int = setting("tokens of executors for one task; 0: no bound", 0, at_least=0)
    max_text: int = setting("characters of an argument and of the answer", 20_000, at_least=1)
    seconds: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        self.executors = {"": names[0], **self.executors}
        self.callable = resolve_operators(self.operators)
        check_executors(self.callable, self.executors, self.prompts, names)
        self.rules = Restrictions(
            tuple(self.callable),
            banned=tuple(self.banned),
            max_nodes=self.max_nodes,
            max_chars=self.max_chars,
        )
        self.limits = Limits(seconds=self.seconds, calls=4 * self.max_calls)
        if fault := self.fault(self.program):
            raise SettingError(f"program: no valid program ({fault})")

    def fault(self, program: Any) -> str:
        """The first rule that a program breaks, "" if it keeps them all. Nothing of it runs."""
        if not isinstance(program, str):
            return f"type: expected a text, got {program!r:.60}"
        if fault := self.rules.fault(program):
            return fault
        entries = [n for n in parsed(program).body if getattr(n, "name", "") == ENTRY]
        return f"answer: it defines {ENTRY} more than once" if len(entries) > 1 else ""

    def params(self) -> tuple[Param, ...]:
        """The agents' params, and `program`."""
        names = ", ".join(self.callable)
        own = Param(
            PROGRAM,
            self.program,
            "program",
            role=f"the program that answers every task by calling {names}",
            legal=lambda value: self.fault(value) or None,
        )
        return (*super().params(), own)

    async def run(self, task: Task, team: Team) -> Output:
        program = self.program_for(task, team)
        context = OperatorContext(
            team, task, None, self.executors, self.prompts, self.max_calls, self.max_text,
            self.max_tokens,
        )  # fmt: skip
        outcome = await run_program(program, context, self.callable, self.limits)
        answer = answer_of(outcome)
        reads = context.reads([answer])
        ended = team.record(PROGRAM, answer, reads=reads, error=failed(outcome))
        return Output(answer, (ended,))

    def program_for(self, task: Task, team: Team) -> str:
        """The program that answers a task: the team's one for all."""
        return str(team.values.get(PROGRAM, self.program))

    async def dry_run(self, program: str, team: Team) -> str:
        """Why a program cannot be run: a rule that it breaks, or what went wrong with sketched
        answers; "" if it can."""
        return self.fault(program) or await dry_run(
            program, self.callable, team, self.max_text, self.limits
        )
