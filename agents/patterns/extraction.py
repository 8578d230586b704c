"""Extraction: an agent answers a templated message, and a program takes the answer out of its
reply.

Template and program are params of the system, beside the agent's own, so a method can rewrite all
three (the BIG-Bench Hard example of Trace, arXiv:2406.16218). The program runs in the sandbox alone
and sees nothing but the reply. Both stand on record as operations of their params' names: the
message, and what was extracted, or its error.

    Extraction(["solver"], extract="def extract(reply):\\n    return reply.split()[-1]")
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

from ..execution import Limits
from ..lookup import trusted
from ..programs.restrictions import parsed
from ..programs.workflow import answer_of, failed
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.templates import fields_in, render
from ..transcript import Output
from ..types import SettingError, Task

TEMPLATE, EXTRACT = "template", "extract"  # names of the params, and of their operations
LAST_LINE = "def extract(reply):\n    return reply.strip().split('\\n')[-1]"


@trusted("system")
@dataclass
class Extraction(System):
    """One agent, a template and a program.

    Args:
        template: the message; `{problem}` is the task's text.
        extract: source with a function `extract(reply)` that returns the answer; `re` and other
            plain modules may be imported. It may raise: the output is empty then.
        seconds: of computing for one reply. max_chars: of the program. max_text: of the answer.
    """

    template: str = "{problem}"
    extract: str = LAST_LINE
    seconds: float = setting("seconds that the program may compute", 2.0, above=0)
    max_chars: int = setting("characters of the program", 8000, at_least=1)
    max_text: int = setting("characters of the answer", 20_000, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.specs) != 1:
            raise SettingError(f"Extraction: one agent expected, got {len(self.specs)}")
        for param in self.params():
            if not param.agent and (problem := param.problem(param.value)):
                raise SettingError(f"{param.name}: {problem}")

    def params(self) -> tuple[Param, ...]:
        """The agent's params, `template` and `extract`."""
        role = "the message to the agent, in which {problem} stands for the task's text"
        program = "Python source with the function extract(reply), which returns the answer"
        return (
            *super().params(),
            Param(TEMPLATE, self.template, "text", role=role, legal=_template_fault),
            Param(EXTRACT, self.extract, "program", role=program, legal=self._program_fault),
        )

    def _program_fault(self, program: str) -> str | None:
        """Why a program cannot be run, as far as its text tells; nothing of it runs."""
        if len(program) > self.max_chars:
            return f"{len(program)} characters, at most {self.max_chars}"
        try:
            body = parsed(program).body
        except SyntaxError as error:
            return f"no Python: {' '.join(str(error).split())[:120]}"
        defined = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == EXTRACT]
        return None if defined else f"it defines no function {EXTRACT}(reply)"

    async def run(self, task: Task, team: Team) -> Output:
        (agent,) = team
        template = team.values.get(TEMPLATE, self.template)
        message = team.record(
            TEMPLATE, render(template, {"problem": task.prompt}, setting=TEMPLATE)
        )
        reply = await agent.reply(message.text, reads=[message])
        program = team.values.get(EXTRACT, self.extract)
        source = f"{program}\n{EXTRACT}({reply.text!r})"
        outcome = await team.execute(source, {}, Limits(seconds=self.seconds))
        answer, error = answer_of(outcome), failed(outcome)
        if len(answer) > self.max_text:
            answer, error = "", f"output: an answer of more than {self.max_text} characters"
        found = team.record(EXTRACT, answer, reads=[reply], error=error)
        return Output(answer, [found])


def _template_fault(template: Any) -> str | None:
    try:
        fields = fields_in(template, setting=TEMPLATE)
    except SettingError as error:
        return str(error)
    return None if fields == ["problem"] else f"expected the field {{problem}} alone, got {fields}"
