"""The step language: a workflow in words, one step a line, `Name:::Type:::Instruction:::Branches`.

The language of CoRE and AutoFlow (arXiv:2407.12821). A type is `process` (one branch, with key
`next`), `decision` (two branches or more, of which one is taken) or `terminal` (none). Branches are
keys and names of steps in turn, parted by `::`. The first line is where a workflow begins. Names,
types, keys and targets are read in lower case.

    step 1:::process:::Work out the answer.:::next::step 2
    step 2:::decision:::Is it right?:::yes::step 3::no::step 1
    step 3:::terminal:::

Against the authors' code: nothing is dropped. There a branch behind a second `:::` is lost without
a word, a terminal without a last separator ends the program, and steps that nothing leads to are
taken; here all that a line says is read or the whole text is refused, every step can be reached,
and from every step a terminal can. An instruction may hold no marks of tool calls: which tools
there are is said by the interpreter's settings, not by a workflow.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

FIELD, BRANCH = ":::", "::"  # between the fields of a line, and between keys and targets
NEXT = "next"  # the key of a process's branch
TYPES = ("process", "decision", "terminal")
ROW = "Name:::Type:::Instruction:::Branches"
_COLONS = re.compile(r":+")
_MARKS = re.compile(r"</?tool_(?:call|response)>", re.IGNORECASE)


class StepsError(ValueError):
    """What is wrong with a workflow, in words that begin with a short kind and a colon."""


@dataclass(frozen=True)
class Step:
    """One step. `branches`: the name of the step that follows, by key."""

    name: str
    type: str
    instruction: str = ""
    branches: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Its line."""
        parts = [self.name, self.type, self.instruction]
        pairs = [part for pair in self.branches.items() for part in pair]
        colons = any(part[:1] == ":" or part[-1:] == ":" for part in pairs)
        parts.append((f" {BRANCH} " if colons else BRANCH).join(pairs))
        while not parts[-1]:
            parts.pop()
        colons = any(part[:1] == ":" or part[-1:] == ":" for part in parts)
        return (f" {FIELD} " if colons else FIELD).join(parts)


@dataclass(frozen=True)
class Steps:
    """A valid workflow: its steps by name, the first one first."""

    by_name: Mapping[str, Step]

    @property
    def entry(self) -> Step:
        """The step that a workflow begins with."""
        return next(iter(self.by_name.values()))

    def __str__(self) -> str:
        """Its text in one spelling: equal workflows, equal texts."""
        return "\n".join(map(str, self.by_name.values()))


def parse_steps(text: str, *, max_steps: int = 20, max_chars: int = 8000) -> Steps:
    """The workflow that a text is. Raises `StepsError` at the first rule that it breaks; empty
    lines are no steps."""
    if len(text) > max_chars:
        raise StepsError(f"length: {len(text)} characters, at most {max_chars}")
    steps: dict[str, Step] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        step = parse_step(line, f"line {number}")
        if step.name in steps:
            raise StepsError(f"name: two steps are called {step.name!r}")
        steps[step.name] = step
    if not steps:
        raise StepsError("missing: the workflow holds no step")
    if len(steps) > max_steps:
        raise StepsError(f"length: {len(steps)} steps, at most {max_steps}")
    _check_graph(steps)
    return Steps(steps)


def parse_step(line: str, where: str = "the line") -> Step:
    """The step that a line is. Raises `StepsError`; `where` names the line in it."""
    if any(len(run) > 3 and len(run) % 3 for run in _COLONS.findall(line)):
        raise StepsError(f"row: {where} holds colons that are neither {BRANCH!r} nor {FIELD!r}")
    if mark := _MARKS.search(line):
        raise StepsError(f"tool: {where} holds {mark[0]!r}; a step is words alone")
    fields = [part.strip() for part in line.split(FIELD)]
    if not 2 <= len(fields) <= 4:
        raise StepsError(
            f"row: {where} has {len(fields)} fields, expected {ROW}; all branches of a step stand"
            f" in its last field, parted by {BRANCH!r}"
        )
    name, type_, instruction, branches = fields + [""] * (4 - len(fields))
    name, type_ = _name(name), type_.lower()
    if not name:
        raise StepsError(f"name: {where} has no name")
    if type_ not in TYPES:
        raise StepsError(f"type: {name!r} is of type {type_[:40]!r}, expected {', '.join(TYPES)}")
    if not instruction and type_ != "terminal":
        raise StepsError(f"instruction: {name!r} has none")
    step = Step(name, type_, instruction, _branches(branches, name))
    _check_branches(step)
    return step


def _name(text: str) -> str:
    return " ".join(text.lower().split())


def _branches(text: str, step: str) -> dict[str, str]:
    """Targets by key."""
    parts = [_name(part) for part in text.split(BRANCH)] if text else []
    if len(parts) % 2 or not all(parts):
        raise StepsError(f"branches: of {step!r}, expected keys and names of steps in turn")
    keys = parts[::2]
    if len({*keys}) < len(keys):
        raise StepsError(f"branches: {step!r} has two of one key")
    return dict(zip(keys, parts[1::2], strict=True))


def _check_branches(step: Step) -> None:
    count = len(step.branches)
    if step.type == "process" and [*step.branches] != [NEXT]:
        raise StepsError(
            f"branches: {step.name!r} is a process, so it has one branch, with key {NEXT!r}"
        )
    if step.type == "decision" and count < 2:
        raise StepsError(f"branches: {step.name!r} is a decision with {count}, expected 2 or more")
    if step.type == "terminal" and count:
        raise StepsError(f"branches: {step.name!r} is a terminal and has none")


def _check_graph(steps: Mapping[str, Step]) -> None:
    """All targets are there, every step can be reached, and from each one a terminal can."""
    for step in steps.values():
        for target in step.branches.values():
            if target not in steps:
                raise StepsError(
                    f"target: {step.name!r} leads to {target[:40]!r}, which is no step"
                )
    if not next(iter(steps.values())).instruction:
        raise StepsError("instruction: the workflow asks for nothing")
    ends = [step.name for step in steps.values() if step.type == "terminal"]
    if not ends:
        raise StepsError("terminal: no step is one")
    onward = {name: [*step.branches.values()] for name, step in steps.items()}
    first = next(iter(steps))
    if lost := _not_among(steps, _reached([first], onward)):
        raise StepsError(f"reachability: nothing leads from {first!r} to {lost!r}")
    backward: dict[str, list[str]] = {name: [] for name in steps}
    for name, targets in onward.items():
        for target in targets:
            backward[target].append(name)
    if stuck := _not_among(steps, _reached(ends, backward)):
        raise StepsError(f"terminal: none can be reached from {stuck!r}")


def _not_among(steps: Iterable[str], reached: Collection[str]) -> str | None:
    return next((name for name in steps if name not in reached), None)


def _reached(start: Iterable[str], edges: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    todo = [*start]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += edges[name]
    return found
