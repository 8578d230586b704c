"""A workflow: a designer writes a program for the task at hand, and the program calls operators,
which executor agents answer.

The program runs in the sandbox and can do nothing but call operators (`operators.py`). Its answer
is scored like any team's output; the policies say which agents are trained: the designer, the
executors, or both. A program that cannot be run is a fact of its episode: each of the designer's
turns has a reward named `valid`, with the reason where it is 0, and `ran` for how its run ended.

Setting after ScoreFlow (arXiv:2502.04306): the designer sees the problem, the operators and an
example, never an answer, test or score. Not copied: its class with a constructor; here a program is
a few lines whose last expression, or whose `async def workflow()`, is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..execution import ExecutionResult, Limits
from ..lookup import trusted
from ..settings import setting
from ..system import System
from ..team import Team
from ..text.templates import render
from ..transcript import LimitError
from ..types import Reward, SettingError, Task, Turn, nearest
from .operators import (
    OPERATORS,
    Operator,
    OperatorContext,
    QuotaError,
    externals,
    prompt_for,
    resolve_operators,
)
from .restrictions import Restrictions, program_of, whole

TEMPLATE = 'solution = await custom("Solve the problem step by step.")\nsolution'
DESIGN = """Write a Python program that solves the problem below by calling these functions:

{operators}

`problem` holds the text of the problem, and every function sees it. Do not solve the problem \
yourself and do not write its numbers into the program: write how it should be solved. Loops, \
conditions and asyncio.gather are allowed; files, other modules and new functions of a language \
model are not. The value of the last line, an expression, is the answer. An example, to be \
improved on:

<graph>
{template}
</graph>

Problem:
{prompt}

End with your program between <graph> and </graph>."""
SOURCE = "workflow"  # of the rewards that the system itself gives


@dataclass(frozen=True)
class Design:
    """A program that a designer wrote. `fault`: why it cannot be run, "" if it can. `turn`: None
    for one that no agent wrote."""

    program: str
    fault: str = ""
    turn: Turn | None = None


@trusted("system")
@dataclass
class Workflow(System):
    """A designer and its executors.

    Args:
        designer: the agent that writes programs; "" is the first agent. All others are executors.
        operators: what programs may call: names of `OPERATORS`, or `module:NAME` of your own.
        executors: agent by operator; "" names the one for all others, by default the first
            executor.
        prompts: templates by operator, in place of `operators.PROMPTS`.
        instruction: the designer's prompt; fields `prompt`, `operators`, `template`.
            `template`: the example it is shown.
        tag: the program stands between `<tag>` and `</tag>`; "" takes the last fenced block, or the
            whole reply.
        attempts: a designer whose program is invalid is asked anew, up to so many times in all. Its
            earlier turns then count as not taken.
        fallback: a program that is run in place of an invalid one, which stays invalid; "" runs
            nothing, and the output is empty.
        max_similarity, banned, max_nodes, max_chars: see `Restrictions`. dry_run: try a program
            with sketched answers before it counts as valid.
        max_calls: calls of executors in one run. max_text: characters that an operator takes, and
            of the answer. seconds: of computing.
    """

    designer: str = ""
    operators: Sequence[str] = tuple(OPERATORS)
    executors: Mapping[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    instruction: str = DESIGN
    template: str = TEMPLATE
    tag: str = "graph"
    attempts: int = setting("programs that the designer may write", 1, at_least=1)
    fallback: str = ""
    max_similarity: float = setting("likeness to the example", 1.0, above=0, at_most=1)
    banned: Sequence[str] = ()
    max_nodes: int = setting("calls of operators in a program", 20, at_least=1)
    max_chars: int = setting("characters of a program", 8000, at_least=1)
    dry_run: bool = True
    max_calls: int = setting("calls of executors in one run", 20, at_least=1)
    max_text: int = setting("characters of an argument and of the answer", 20_000, at_least=1)
    seconds: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        self.designer = self.designer or names[0]
        others = [name for name in names if name != self.designer]
        if self.designer not in names or not others:
            raise SettingError(
                f"Workflow: a designer and at least one executor expected, got {names} and"
                f" designer={self.designer!r}"
            )
        self.executors = {"": others[0], **self.executors}
        self.callable = resolve_operators(self.operators)
        check_executors(self.callable, self.executors, self.prompts, others)
        self.rules = Restrictions(
            tuple(self.callable),
            self.template,
            self.max_similarity,
            tuple(self.banned),
            self.max_nodes,
            self.max_chars,
        )
        self.limits = Limits(seconds=self.seconds, calls=4 * self.max_calls)
        if self.fallback and (fault := self.rules.fault(self.fallback)):
            raise SettingError(f"fallback: no valid program ({fault})")
        self.instructed(Task("", ""))  # checks the template

    async def run(self, task: Task, team: Team) -> str:
        for left in reversed(range(self.attempts)):
            turn = await team[self.designer].fresh().reply(self.instructed(task))
            design = await self.read(turn, team)
            if not design.fault or not left:
                break
            team.select(turn, taken=False)
        if design.fault and not self.fallback:
            return ""
        return answer_of(
            await self.perform(Design(self.fallback) if design.fault else design, task, team)
        )

    # The parts, for systems that design in several rounds.

    def instructed(self, task: Task) -> str:
        """The designer's prompt for a task."""
        docs = "\n".join(f"- {operator}" for operator in self.callable.values())
        fields = {"prompt": task.prompt, "operators": docs, "template": self.template}
        return render(self.instruction, fields, setting="instruction")

    async def read(self, turn: Turn, team: Team) -> Design:
        """The program in a designer's turn, checked and dry-run. What is wrong with it stands in
        the turn's reward `valid`."""
        program = program_of(turn.text, self.tag)
        fault = (
            "missing: the reply holds no program" if program is None else self.rules.fault(program)
        )
        if program is not None and not fault and self.dry_run:
            fault = await dry_run(program, self.callable, team, self.max_text, self.limits)
        team.rewards.append(reward_of(turn, "valid", float(not fault), fault))
        return Design(program or "", fault, turn)

    async def perform(self, design: Design, task: Task, team: Team) -> ExecutionResult:
        """Run a valid program on a task. Whatever it does is the outcome; its turn's reward `ran`
        holds how it ended."""
        context = OperatorContext(
            team, task, design.turn, self.executors, self.prompts, self.max_calls, self.max_text
        )
        outcome = await run_program(design.program, context, self.callable, self.limits)
        if design.turn is not None:
            fault = failed(outcome)
            team.rewards.append(reward_of(design.turn, "ran", float(not fault), fault))
        return outcome


async def run_program(
    program: str, context: OperatorContext, operators: Mapping[str, Operator], limits: Limits
) -> ExecutionResult:
    """Run a valid program on the context's task; beyond one of the context's bounds its status is
    `calls` or `output`."""
    try:
        outcome = await context.team.execute(
            whole(program, context.task.prompt), externals(operators, context), limits
        )
        outcome = located(outcome, program)
    except (QuotaError, LimitError) as error:
        return ExecutionResult("calls", error=str(error))
    if outcome.ok and len(str(outcome.value)) > context.max_text:
        return ExecutionResult(
            "output", error=f"an answer of more than {context.max_text} characters"
        )
    return outcome


async def dry_run(
    program: str, operators: Mapping[str, Operator], team: Team, max_text: int, limits: Limits
) -> str:
    """Why a program cannot be run, tried with sketched answers; "" if it can. Sketches may well
    lead to no answer."""
    outcome = await team.execute(whole(program, "1"), externals(operators, None, max_text), limits)
    outcome = located(outcome, program)
    return "" if outcome.ok and outcome.value is None else failed(outcome)


def located(outcome: ExecutionResult, program: str) -> ExecutionResult:
    """The outcome of a `whole` program with the line that raised in its error."""
    lines, number = program.split("\n"), outcome.line - 1  # the problem stands in the first line
    if not 0 < number <= len(lines):
        return outcome
    error = f"{outcome.error} (line {number}: {lines[number - 1].strip()[:80]})"
    return replace(outcome, error=error)


def answer_of(outcome: ExecutionResult) -> str:
    """A run's answer as a text; "" if it has none."""
    return "" if failed(outcome) else str(outcome.value)


def failed(outcome: ExecutionResult) -> str:
    """Why a run gave no answer, as its status and some words; "" if it gave one."""
    if not outcome.ok:
        return f"{outcome.status}: {outcome.error}"
    if outcome.value is None:
        return "answer: None"
    return (
        "answer: an operator was called without await"
        if str(outcome.value).startswith("<coroutine ")
        else ""
    )


def reward_of(turn: Turn, name: str, value: float, text: str) -> Reward:
    """A reward about one turn, from the workflow itself."""
    return Reward(name, value, text, turn.agent, turn.index, turn.sibling, SOURCE)


def check_executors(
    operators: Mapping[str, Operator],
    executors: Mapping[str, str],
    prompts: Mapping[str, str],
    agents: Sequence[str],
) -> None:
    """Raise `SettingError` at an executor that is none of `agents`, at a setting of an operator
    that is not there, and at a prompt with a field that its operator does not have."""
    for key, name in executors.items():
        if name not in agents:
            raise SettingError(f"executors.{key}: {name!r} is no executor; {nearest(name, agents)}")
    for key in {*executors, *prompts} - {"", *operators}:
        raise SettingError(
            f"executors, prompts: {key!r} is no operator of this workflow;"
            f" {nearest(key, operators)}"
        )
    for name, operator in operators.items():
        _check_prompt(name, operator, prompts)


def _check_prompt(name: str, operator: Operator, prompts: Mapping[str, str]) -> None:
    prompt_for(
        name, prompts, dict.fromkeys(("problem", *operator.signature.parameters, "failure"), "")
    )
