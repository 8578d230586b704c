"""Targets: the params that are rewritten, and what is checked of a proposed value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...agents.state import Param
from ...agents.types import SettingError, Task, nearest
from ..credit.leakage import answer_spellings

KINDS = ("text", "demos", "program", "choice", "number", "flag", "structure")  # that words can say
EXPECTED = {
    "text": "a text",
    "demos": "a list of messages, user and assistant in turn",
    "program": "the whole source of a program, in one text",
    "choice": "a name",
    "number": "a number",
    "flag": "true or false",
    "structure": "a mapping of the same form",
}
SHORT = 20  # characters of a training prompt below which holding it is no copy


@dataclass(frozen=True)
class Target:
    """A param that feedback is collected for, with the value in force."""

    param: Param
    value: object

    @property
    def name(self) -> str:
        return self.param.name

    @property
    def constraint(self) -> str:
        """What its values look like, in words."""
        if self.param.options:
            return f"one of {', '.join(self.param.options)}"
        return EXPECTED[self.param.kind]

    @property
    def role(self) -> str:
        """A line that describes it to a helper."""
        what = f"the {self.param.kind} {self.name!r}"
        owner = f" of the agent {self.param.agent!r}" if self.param.agent else " of the program"
        return what + owner + (f", whose role is: {self.param.role}" if self.param.role else "")


def as_text(value: Any) -> str:
    """A value as a prompt shows it: texts as they are, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def chosen_params(
    params: Sequence[Param], names: Sequence[str], policies: Sequence[str] = ()
) -> list[Param]:
    """The params of these names; of none the agents' prompts. Raises `SettingError` at a name that
    is none, or of a kind that words cannot say.

    policies: those of the run, among which the values of `NAME.policy` are.
    """
    known = {
        param.name: replace(param, options=tuple(policies))
        if policies and param.name == f"{param.agent}.policy"
        else param
        for param in params
    }
    for name in names:
        if name not in known:
            raise SettingError(f"params: no param {name!r}; {nearest(name, known)}")
        if known[name].kind not in KINDS:
            raise SettingError(
                f"params: {name} is of kind {known[name].kind}; expected one of {', '.join(KINDS)}"
            )
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [param for param in params if param.name == f"{param.agent}.prompt"]


def copied_tasks(value: Any, before: Any, tasks: Sequence[Task]) -> list[str]:
    """Ids of the tasks whose prompt stands in a value word for word (whatever the white space), or,
    where the prompt is short, whose prompt and answer both do; what the value held before is no
    copy."""
    if not isinstance(value, str):
        value, before = str(value), str(before)
    text, old = (f" {' '.join(each.split())} " for each in (value, str(before)))
    copied = []
    for task in tasks:
        prompt = " ".join(task.prompt.split())
        if not prompt or prompt in old or prompt not in text:
            continue
        answers = answer_spellings(task)
        if len(prompt) >= SHORT or any(f" {answer}" in text for answer in answers):
            copied.append(task.id)
    return copied
