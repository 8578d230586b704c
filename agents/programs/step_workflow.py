"""A workflow in step language, written once for all tasks of a kind, which an interpreter follows
step by step.

The system of AutoFlow (arXiv:2407.12821) and of CoRE, whose interpreter it is. The workflow is the
value `workflow` of the team's state, so a method can look for a better one and a checkpoint keeps
it. The interpreter sees the task, the step's instruction and its notes: what it said at earlier
steps. Its tools are those of its agent (`agents.NAME.tools`): calls are run inside the step. How a
run ended stands in the episode's operation `workflow`: its text is the answer, its `error` why
there is none; the operation `steps` names the steps that were taken.

A designer may stand among the agents, for a method that trains it; it does not speak when a
task is played.

Against the authors' code: one request a step, where there further ones select notes, look for a
tool's name and pick the branch; a reply that names no branch ends the run with an error; a terminal
with an instruction gives the answer, one without leaves it at the last reply.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.templates import fields_in, render
from ..transcript import Output
from ..types import SettingError, Task, Turn, nearest
from .restrictions import program_of
from .steps import Step, Steps, StepsError, parse_steps

WORKFLOW = "workflow"  # the name of the param, and of the operation
MANUAL = """step 1:::process:::Work out the answer to the task, step by step.:::next::step 2
step 2:::decision:::Look for mistakes in the notes. Is the answer right?:::yes::step 3::no::step 1
step 3:::terminal:::Give the answer alone."""
DESIGN = """Write a workflow by which a language model solves tasks of this kind: {description}

A workflow is a text with one step a line, in four fields: Name:::Type:::Instruction:::Branches
- The first line is the step that it begins with.
- Type is process, decision or terminal.
- Instruction says in words what the model has to do at this step. It sees the task and what it \
said at earlier steps. It may call these tools: {tools}
- Branches of a process are next::NAME, the step that follows. Those of a decision are its \
possible answers, each with the step that follows: yes::NAME::no::NAME. A terminal has none and \
ends the workflow; its instruction says what the answer looks like.
- Every step can be reached, and from every step a terminal. At most {max_steps} steps.

An example:

<workflow>
{example}
</workflow>

End with a better workflow between <workflow> and </workflow>."""
ASK = "{prompt}\n\n{notes}Do this step of the work, and no other: {instruction}"
DECIDE = ASK + "\n\nEnd with one of these answers alone on the last line: {keys}"


@trusted("system")
@dataclass
class StepWorkflow(System):
    """An interpreter that follows a workflow in step language, and perhaps a designer.

    Args:
        workflow: the one in force while `values` has none.
        designer: the agent that writes workflows for a method; "" is none.
        interpreter: the agent that follows them; "" is the first that is no designer.
        description: the kind of tasks, in words for a designer. It sees no task.
        design: a designer's prompt; fields `description`, `tools` (names), `example`, `max_steps`.
        tag: a designer's workflow stands between `<tag>` and `</tag>`; "" takes the last fenced
            block, or the whole reply.
        ask, decide: the interpreter's prompt at a step and at a decision; fields `prompt` (the
            task), `instruction`, `notes`, `step` (its name), `keys` (of the branches).
        note: how a note is shown; fields `step` and `text`. num_notes: the last so many are.
        max_rounds: steps that are taken for one task. max_steps, max_chars: of a workflow.
    """

    workflow: str = MANUAL
    designer: str = ""
    interpreter: str = ""
    description: str = "see the example"
    design: str = DESIGN
    tag: str = WORKFLOW
    ask: str = ASK
    decide: str = DECIDE
    note: str = "You noted at {step}: {text}\n\n"
    num_notes: int = setting("notes of earlier steps that the interpreter sees", 20, at_least=0)
    max_rounds: int = setting("steps taken for one task", 20, at_least=1)
    max_steps: int = setting("steps of a workflow", 20, at_least=1)
    max_chars: int = setting("characters of a workflow", 8000, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        readers = [name for name in names if name != self.designer]
        if self.designer and self.designer not in names:
            raise SettingError(
                f"designer: {self.designer!r} is no agent; {nearest(self.designer, names)}"
            )
        if not readers:
            raise SettingError("StepWorkflow: an interpreter expected beside the designer")
        self.interpreter = self.interpreter or readers[0]
        if self.interpreter not in readers:
            raise SettingError(
                f"interpreter: {self.interpreter!r} is no agent that can follow a workflow;"
                f" {nearest(self.interpreter, readers)}"
            )
        if fault := self.fault(self.workflow):
            raise SettingError(f"workflow: no valid workflow ({fault})")
        self._check_templates()

    def _check_templates(self) -> None:
        render(self.note, {"step": "", "text": ""}, setting="note")
        for name in ("ask", "decide"):
            fields = dict.fromkeys(("prompt", "instruction", "notes", "step", "keys"), "")
            render(getattr(self, name), fields, setting=name)
        self.design_prompt()

    # workflows

    def parse(self, text: str) -> Steps:
        """The workflow that a text is, within this team's bounds. Raises `StepsError`."""
        return parse_steps(text, max_steps=self.max_steps, max_chars=self.max_chars)

    def fault(self, value: Any) -> str:
        """The first rule that a workflow breaks, "" if it keeps them all."""
        if not isinstance(value, str):
            return f"type: expected a text, got {value!r:.60}"
        try:
            self.parse(value)
        except StepsError as error:
            return str(error)
        return ""

    def read(self, reply: str) -> tuple[str, str]:
        """(workflow in one spelling, fault) of a designer's reply; one of the two is ""."""
        text = program_of(reply, self.tag)
        if text is None:
            return "", "missing: the reply holds no workflow"
        try:
            return str(self.parse(text)), ""
        except StepsError as error:
            return "", str(error)

    def design_prompt(self, example: str = "") -> str:
        """What a designer is asked. `example`: a workflow; "" is the team's own."""
        tools = next(spec.tools for spec in self.specs if spec.name == self.interpreter)
        fields = {
            "description": self.description,
            "tools": ", ".join(map(str, tools)) or "none",
            "example": example or self.workflow,
            "max_steps": self.max_steps,
        }
        return render(self.design, fields, setting="design")

    def params(self) -> tuple[Param, ...]:
        """The agents' params, and `workflow`."""
        role = f"the workflow by which {self.interpreter} solves every task"
        own = Param(
            WORKFLOW,
            self.workflow,
            "text",
            role=role,
            legal=lambda value: self.fault(value) or None,
        )
        return (*super().params(), own)

    def without_designer(self) -> StepWorkflow:
        """The same team with its interpreter alone: what it answers depends on no designer."""
        agents = tuple(spec for spec in self.specs if spec.name == self.interpreter)
        return replace(self, agents=agents, designer="")

    # one task

    async def run(self, task: Task, team: Team) -> Output:
        steps = self.parse(str(team.values.get(WORKFLOW, self.workflow)))
        notes: list[tuple[Step, Turn]] = []
        taken: list[str] = []
        step, error = steps.entry, ""
        while not error:
            taken.append(step.name)
            if step.instruction:
                notes.append((step, await self._take(step, notes, task, team)))
            if step.type == "terminal":
                break
            key = self._key(step, notes[-1][1].text)
            if not key:
                error = (
                    f"branch: {step.name!r} was answered with none of {', '.join(step.branches)}"
                )
            elif len(taken) == self.max_rounds:
                error = f"steps: no terminal within {self.max_rounds}"
            else:
                step = steps.by_name[step.branches[key]]
        team.record("steps", " > ".join(taken), reads=[turn for _, turn in notes])
        last = notes[-1][1]
        answer = "" if error else last.text
        return Output(answer, (team.record(WORKFLOW, answer, reads=[last], error=error),))

    async def _take(
        self, step: Step, notes: Sequence[tuple[Step, Turn]], task: Task, team: Team
    ) -> Turn:
        """The interpreter's reply at a step."""
        which = "decide" if step.type == "decision" else "ask"
        template: str = getattr(self, which)
        shown = notes[-self.num_notes :] if self.num_notes else []
        quotes = [
            render(self.note, {"step": each.name, "text": turn.text}, setting="note")
            for each, turn in shown
        ]
        fields = {
            "prompt": task.prompt,
            "instruction": step.instruction,
            "notes": "".join(quotes),
            "step": step.name,
            "keys": ", ".join(step.branches),
        }
        text = render(template, fields, setting=which)
        quoted = "notes" in fields_in(template, setting=which)
        quoted = quoted and "text" in fields_in(self.note, setting="note")
        reads = [turn for _, turn in shown] if quoted else []
        return await team[self.interpreter].fresh().reply(text, reads=reads)

    def _key(self, step: Step, reply: str) -> str:
        """The branch that a reply takes; "" if it names none."""
        return next(iter(step.branches)) if step.type == "process" else key_in(reply, step.branches)


def key_in(reply: str, keys: Collection[str]) -> str:
    """The key of a branch that a reply names last, as a word of its own in any case; of several
    that end there the longest. "" if it names none."""
    text = " ".join(reply.lower().split())
    found = [
        (match.end(), len(key), key)
        for key in keys
        for match in re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", text)
    ]
    return max(found, default=(0, 0, ""))[2]
