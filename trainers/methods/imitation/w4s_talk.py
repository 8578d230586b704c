"""A designer's talk about one program for all tasks (W4S, arXiv:2504.04785): its system, how its
replies are read, and its prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ....agents.execution import closed, fenced_blocks, program_in
from ....agents.settings import Settings, setting
from ....agents.team import Team
from ....agents.text.templates import render
from ....agents.types import Message, Task, Turn
from ....rollouts.types import Episode
from ..workflow_search.proposals import DRY_RUN, ProgramTalk, Proposal, checked

INSTRUCTION = """You are an expert in improving programs that solve problems with language models. \
One program has to solve all problems of this kind: {role}. It calls these functions, each of \
which asks a model that is stronger than you:

{operators}

`problem` holds the text of the problem, and every function sees it. The value of the last line, \
an expression, is the answer. Loops, conditions, asyncio.gather and functions of your own are \
allowed; imports of other modules and files are not; at most {max_nodes} calls of functions may \
stand in a program.

Programs so far, with their accuracy on {num_tasks} validation problems:

{archive}

{cases}

First analyse what these programs lack. Think of better instructions, of several answers and a \
vote, of a review and a revision, of computing where models miscount. Do not solve single problems \
in the program: it is tested on others. Then write a better program, whole, in a fenced block:

```python
...
```"""
FEEDBACK = """Accuracy of your program on the validation problems: {accuracy}, {trend} the program \
before ({previous}); the best so far: {best}.

{cases}

Analyse what goes wrong, then write a better program, whole, in a fenced block."""
REPAIR = """Your program cannot be used: {fault}

Find the cause, then write the whole program again in a fenced block. Do not hide the error by try \
and except."""
FIELDS = {
    "instruction": ("role", "operators", "max_nodes", "num_tasks", "archive", "cases", "example"),
    "feedback": (
        "accuracy",
        "previous",
        "best",
        "trend",
        "cases",
        "cases_right",
        "num_cases",
        "program",
    ),
    "repair": ("fault", "program"),
}


@dataclass
class DesignTalkConfig(Settings):
    """What a designer is asked, and how its replies are read."""

    designer: str = setting(
        "the agent that writes programs; the others of the team execute them", "designer"
    )
    instruction: str = setting(
        "the designer's first prompt; fields role, operators, max_nodes, num_tasks, archive (the"
        " programs that a chat begins with), example (the one of them to go on from), cases (its"
        " answers)",
        INSTRUCTION,
    )
    feedback: str = setting(
        "its prompt after a program; fields program, accuracy, trend, previous, best, cases,"
        " cases_right, num_cases",
        FEEDBACK,
    )
    repair: str = setting(
        "its prompt after a program that cannot be used; fields fault, program", REPAIR
    )
    reply_format: str = setting(
        "the program is the last fenced block that calls a function (fenced), or the reply (whole)",
        "fenced",
        choices=("fenced", "whole"),
    )
    design_temperature: float = setting(
        "sampling temperature of a designer that names no sampling of its own", 0.5, at_least=0
    )
    max_program_length: int = setting(
        "tokens of a designer's reply, unless its sampling says otherwise", 4096, at_least=1
    )

    def check(self) -> None:
        for name, fields in FIELDS.items():
            self.prompt(name, **dict.fromkeys(fields, ""))

    def prompt(self, name: str, **fields: object) -> str:
        """A template filled in: `instruction`, `feedback` or `repair`."""
        return render(getattr(self, name), fields, setting=name)


@dataclass(frozen=True)
class DesignReply:
    """A designer's reply: its program, and what stands before and after it. `fault`: why there is
    no program, "" if there is one."""

    text: str
    program: str = ""
    start: int = 0
    end: int = 0
    fault: str = ""
    fenced: bool = True

    def with_program(self, program: str) -> str:
        """The reply with another program in place of its own; one that has none gets it at its
        end, in place of a block that was cut off."""
        if not self.fault:
            line = "\n" if self.text[self.start : self.end].endswith("\n") else ""
            return self.text[: self.start] + program + line + self.text[self.end :]
        text = f"{closed(self.text)}\n\n```python\n{program}\n```"
        return text.lstrip() if self.fenced else program


def read_reply(text: str, operators: Collection[str], reply_format: str) -> DesignReply:
    """The program of a reply: the last closed fenced block that calls an operator, or (`whole`) all
    of it."""
    if reply_format == "whole":
        program = program_in(text)
        start = text.find(program)
        fault = "" if program else "missing: the reply is empty"
        return DesignReply(text, program, start, start + len(program), fault, fenced=False)
    calls = re.compile(rf"\b({'|'.join(map(re.escape, operators))})\s*\(")
    spans = [(a, b) for a, b in fenced_blocks(text) if calls.search(text, a, b)]
    if not spans:
        names = ", ".join(operators)
        fault = f"missing: no closed fenced block of the reply calls a function ({names})"
        return DesignReply(text, fault=fault)
    start, end = spans[-1]
    return DesignReply(text, text[start:end].strip("\n"), start, end)


@dataclass
class DesignTurn(ProgramTalk):
    """One turn of a designer's chat: it goes on with `candidates` replies, whose programs are
    dry-run.

    Args:
        history: the chat so far, user and assistant in turn, without the designer's opening.
        candidates: replies to the task's prompt, which are siblings.
        reply_format: see `read_reply`.
    """

    history: Sequence[Message] = ()
    candidates: int = 1
    reply_format: str = "fenced"

    async def run(self, task: Task, team: Team) -> Turn:
        (agent,) = team
        opening = agent.opening(agent.tools)
        messages = (*opening, *self.history, Message("user", task.prompt))
        turn = await agent.answer(messages, n=self.candidates)
        for each in team.siblings(turn):
            await self.check(self.proposal(each.text), each, team, _dry_run(each.sibling))
        return turn

    def proposal(self, text: str) -> Proposal:
        """The program of a reply, with what was said before it."""
        assert self.target is not None
        reply = read_reply(text, tuple(self.target.callable), self.reply_format)
        note = " ".join(text[: reply.start].rpartition("```")[0].split())[:200]
        return Proposal(note, reply.program, reply.fault)

    def proposals(self, episode: Episode) -> list[Proposal]:
        """The programs of a talk's replies, in the order of siblings, with the faults that their
        dry runs showed."""
        turns = sorted(episode.turns, key=lambda turn: turn.sibling)
        return [checked(self.proposal(t.text), episode, _dry_run(t.sibling)) for t in turns]


def _dry_run(sibling: int) -> str:
    return f"{DRY_RUN} {sibling}"


def repaired_turn(turn: Turn, text: str) -> Turn:
    """The turn with another text, as one that was written and not sampled."""
    if text == turn.text:
        return turn
    return replace(turn, text=text, token_ids=(), logprobs=(), source="written")
