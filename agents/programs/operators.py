"""Operators: what a workflow program can call, each answered by an executor agent.

An operator is a coroutine `(call, arguments...) -> text`; its docstring is part of the designer's
prompt. It asks through `call.ask`, so every reply of an executor is an ordinary turn: metered,
recorded, replayed, and fit to be trained on. A program knows neither agents nor turns; a turn's
`reads` are inferred from where texts stand.

After the operators of ScoreFlow (arXiv:2502.04306) and AFlow (arXiv:2410.10762).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat import Agent
from ..execution import Externals, Limits, ProgramError, answered, program_in
from ..lookup import load_function
from ..team import Team
from ..text.answers import extract, stands_in
from ..text.templates import render
from ..transcript import Operation
from ..types import SettingError, Task, Turn

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"\b([A-Z])\b")
PROMPTS: Mapping[str, str] = {
    "custom": "{problem}\n\n{instruction}",
    "answer_generate": (
        "{problem}\n\nThink step by step, then end with a line `Answer: ` and the answer alone."
    ),
    "ensemble": (
        "{problem}\n\nSeveral solutions:\n\n{solutions}\n\nWhich of them is right, or agrees with"
        " most others? End with its letter alone on the last line."
    ),
    "review": (
        "{problem}\n\nA solution:\n\n{solution}\n\nCheck it. Say what is wrong with it, if"
        " anything, and why."
    ),
    "revise": (
        "{problem}\n\nA solution:\n\n{solution}\n\nA review of it:\n\n{feedback}\n\nWrite the"
        " solution again, mended."
    ),
    "programmer": (
        "{problem}\n\n{analysis}\n\nWrite a Python program that works out the answer and prints it."
        " Standard library only.{failure}"
    ),
    "test": (
        "{problem}\n\nA solution:\n\n{solution}\n\nIt fails a test:\n\n{failure}\n\nSay why, then"
        " write the whole solution again."
    ),
}
CHECKS = Limits(seconds=15.0, cpu_seconds=15)  # of one program that an operator runs


class QuotaError(RuntimeError):
    """A program asked its executors more often than it may; it cannot catch this."""


@dataclass
class OperatorContext:
    """What the operators of one run of a program use, and what they have used so far.

    Args:
        task: as a team sees it, without answers. `author`: the turn in which the program stands,
            None if no agent wrote it.
        executors: agent by operator; others go to the agent named by the key "".
        prompts: templates by operator that replace those of `PROMPTS`.
        max_calls: calls of executors in the run. `max_text`: characters of one argument.
        max_tokens: tokens of prompts and replies after which no executor is asked any more; 0 sets
            no bound.
        num_calls, turns: calls of executors so far, and their turns. noted: operations whose text
            operators may be given, such as solutions.
    """

    team: Team
    task: Task
    author: Turn | None
    executors: Mapping[str, str]
    prompts: Mapping[str, str] = field(default_factory=dict)
    max_calls: int = 20
    max_text: int = 20_000
    max_tokens: int = 0
    num_calls: int = 0
    turns: list[Turn] = field(default_factory=list)
    noted: list[Operation] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and replies so far, as counted here or by an outside model's server."""
        return sum(
            turn.usage.prompt_tokens + turn.usage.sampled_tokens
            if turn.usage
            else len(turn.prompt_ids) + len(turn.token_ids)
            for turn in self.turns
        )

    def executor(self, operator: str) -> Agent:
        """The agent that answers for an operator."""
        return self.team[self.executors.get(operator, self.executors[""])]

    def reads(self, texts: Sequence[str]) -> list[Turn | Operation]:
        """The turns and operations whose text stands in what a program passed on: executors', and
        the author's for words that no executor wrote."""
        turns: list[Turn | Operation] = []
        known: list[Turn | Operation] = [*self.turns, *self.noted]
        for text in filter(str.strip, texts):
            same = [turn for turn in known if turn.text.strip() == text.strip()]
            quoted = same or [turn for turn in known if stands_in(turn.text, text)]
            turns += quoted + ([] if same or self.author is None else [self.author])
        return list({turn.index: turn for turn in turns}.values())


class OperatorCall:
    """One call of an operator. Its turns' indices are reserved when the program calls, so they do
    not depend on timing. `turns`: those it has asked for so far."""

    def __init__(self, context: OperatorContext, operator: Operator) -> None:
        self.context, self.operator = context, operator
        self.turns: list[Turn] = []
        width = context.executor(operator.name).turns_per_reply
        first = context.team.reserve(width * operator.calls)
        self._indices: Iterator[int] = iter(range(first, first + width * operator.calls, width))

    async def ask(
        self,
        fields: Mapping[str, str],
        quoted: Sequence[str],
        *,
        template: str = "",
        temperature: float | None = None,
    ) -> str:
        """Ask the executor with this operator's template, or the one named, at its own temperature
        or this one; `quoted`: the texts among the fields that come from the program.

        Raises `QuotaError` beyond the run's calls or tokens.
        """
        context = self.context
        if 0 < context.max_tokens <= context.num_tokens:
            raise QuotaError(f"its executors took {context.max_tokens} tokens and more")
        if context.num_calls >= context.max_calls:
            raise QuotaError(f"asked its executors more than {context.max_calls} times")
        context.num_calls += 1
        fields = {"problem": context.task.prompt, **fields}
        text = prompt_for(template or self.operator.name, context.prompts, fields)
        agent = context.executor(self.operator.name).fresh()
        sampling = None if temperature is None else replace(agent.sampling, temperature=temperature)
        index = next(self._indices)
        turn = await agent.reply(text, reads=context.reads(quoted), sampling=sampling, index=index)
        context.turns.append(turn)
        self.turns.append(turn)
        return whole_characters(turn.text)

    async def run(self, program: str) -> tuple[bool, str]:
        """Run plain Python in the sandbox: (did it end well, what it printed or why not)."""
        outcome = await self.context.team.execute(program, None, CHECKS)
        return outcome.ok, outcome.output if outcome.ok else f"{outcome.status}: {outcome.error}"


def prompt_for(operator: str, prompts: Mapping[str, str], fields: Mapping[str, str]) -> str:
    """An operator's prompt: its template filled in. Raises `SettingError` at a field that the
    operator does not have."""
    template = prompts.get(operator) or PROMPTS.get(operator, "{problem}")
    return render(template, fields, setting=f"prompts.{operator}").strip()


@dataclass(frozen=True)
class Operator:
    """What a program may call.

    Args:
        function: `(call, arguments...) -> value`, a coroutine; parameters are `str` or `list[str]`.
        calls: executor calls that one call of it takes at most.
        sketch: `(arguments...) -> value`, what the dry run answers in its place.
        alias: its name, where that is not the function's.
    """

    function: Callable[..., Awaitable[Any]]
    calls: int
    sketch: Callable[..., Any]
    alias: str = ""

    def __call__(self, call: OperatorCall, **arguments: Any) -> Awaitable[Any]:
        return self.function(call, **arguments)

    @property
    def name(self) -> str:
        return self.alias or self.function.__name__

    @property
    def signature(self) -> inspect.Signature:
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __str__(self) -> str:
        """For the designer: how it is called, and what it does."""
        parameters = ", ".join(
            f"{name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}")
            for name, p in self.signature.parameters.items()
        )
        words = " ".join((inspect.getdoc(self.function) or "").split())
        return f"await {self.name}({parameters}) -> {self.signature.return_annotation}: {words}"

    def arguments(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], max_text: int
    ) -> dict[str, Any]:
        """What a program passed, by name. Raises `TypeError` or `ProgramError`, which the program
        sees."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {
            name: (
                [text_of(each, name, max_text) for each in _listed(value, name)]
                if self.signature.parameters[name].annotation == "list[str]"
                else text_of(value, name, max_text)
            )
            for name, value in bound.arguments.items()
        }


def text_of(value: Any, name: str, longest: int) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ProgramError(f"{name}: expected a text, got a {type(value).__name__}")
    if len(text := str(value)) > longest:
        raise ProgramError(f"{name}: a text of {len(text)} characters; at most {longest} are read")
    return whole_characters(text)


def whole_characters(text: str) -> str:
    """The text with `?` in place of lone surrogates, which a program cannot be given."""
    return text.encode("utf-8", "replace").decode()


def _listed(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= len(LETTERS):
        raise ProgramError(
            f"{name}: expected a list of 1 to {len(LETTERS)} texts, got {value!r:.80}"
        )
    return value


def externals(
    operators: Mapping[str, Operator], context: OperatorContext | None, max_text: int = 20_000
) -> Externals:
    """The functions that a program can call. Without a context they answer with sketches: a dry
    run."""

    def external(operator: Operator) -> Callable[..., Awaitable[Any]]:
        # Not async: indices are reserved in the order of the program's calls.
        def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            longest = context.max_text if context else max_text
            arguments = operator.arguments(args, kwargs, longest)
            if context is None:
                return _sketched(operator, arguments)
            return operator(OperatorCall(context, operator), **arguments)

        return call

    return {name: external(operator) for name, operator in operators.items()}


async def _sketched(operator: Operator, arguments: Mapping[str, Any]) -> Any:
    return operator.sketch(**arguments)


# The shipped operators. Their docstrings are part of the designer's prompt.


async def custom(call: OperatorCall, instruction: str) -> str:
    """One answer of a language model to the problem, as your instruction says. The instruction may
    quote earlier results."""
    return await call.ask({"instruction": instruction}, [instruction])


async def answer_generate(call: OperatorCall) -> str:
    """One answer to the problem, thought out step by step and given without the thoughts."""
    text = await call.ask({}, [])
    return extract(text) or text


async def ensemble(call: OperatorCall, solutions: list[str]) -> str:
    """The best of several solutions, chosen by a language model."""
    lettered = "\n\n".join(
        f"{letter}: {solution}" for letter, solution in zip(LETTERS, solutions, strict=False)
    )
    text = await call.ask({"solutions": lettered}, solutions)
    letters = [letter for letter in _LETTER.findall(text) if letter in LETTERS[: len(solutions)]]
    if not letters:
        raise ProgramError(
            f"ensemble: nobody chose one of {len(solutions)} solutions; the reply was {text[:60]!r}"
        )
    return solutions[LETTERS.index(letters[-1])]


async def review(call: OperatorCall, solution: str) -> str:
    """What is wrong with a solution, in words."""
    return await call.ask({"solution": solution}, [solution])


async def revise(call: OperatorCall, solution: str, feedback: str) -> str:
    """A solution written again after feedback."""
    return await call.ask({"solution": solution, "feedback": feedback}, [solution, feedback])


async def programmer(call: OperatorCall, analysis: str = "") -> str:
    """What a Python program prints that a language model writes for the problem; it has three
    tries."""
    failure, reply = "", ""
    for _ in range(call.operator.calls):
        reply = await call.ask({"analysis": analysis, "failure": failure}, [analysis, reply])
        ended, printed = await call.run(program_in(reply))
        if ended:
            return printed.strip()
        failure = f"\n\nAn earlier program was:\n\n{reply}\n\nIt failed: {printed}"
    raise ProgramError(f"programmer: no program ran; the last one: {printed[:200]}")


async def test(call: OperatorCall, solution: str) -> str:
    """A solution that is a program, mended until it passes the problem's public tests, or as it is
    after three tries."""
    for _ in range(call.operator.calls):
        failure = await _failing(call, solution)
        if not failure:
            break
        solution = await call.ask({"solution": solution, "failure": failure}, [solution])
    return solution


async def _failing(call: OperatorCall, solution: str) -> str:
    """The first public test that a solution fails, and how; "" if it passes them all, or there are
    none."""
    task, team = call.context.task, call.context.team
    tests = [str(test) for test in task.meta.get("tests") or ()]
    if not tests:
        return ""
    verdict = await team.check(*answered(task, solution, tests), CHECKS)
    return next((f"{t}\n{why}" for t, why in zip(tests, verdict.results, strict=True) if why), "")


OPERATORS: Mapping[str, Operator] = {
    each.name: each
    for each in (
        Operator(custom, 1, lambda instruction: "1"),
        Operator(answer_generate, 1, lambda: "1"),
        Operator(ensemble, 1, lambda solutions: solutions[0]),
        Operator(review, 1, lambda solution: "It is right."),
        Operator(revise, 1, lambda solution, feedback: solution),
        Operator(programmer, 3, lambda analysis: "1"),
        Operator(test, 3, lambda solution: solution),
    )
}


def resolve_operators(names: Sequence[str]) -> dict[str, Operator]:
    """Operators by name: shipped ones, or `module:NAME` of an `Operator`. Raises `SettingError`
    naming the one that cannot be found."""
    operators: dict[str, Operator] = {}
    for name in names:
        operator = load_function("operator", name, OPERATORS)
        if not isinstance(operator, Operator):
            raise SettingError(
                f"operator {name!r}: expected an Operator (marlora.agents.programs.operators),"
                f" found {operator!r:.60}"
            )
        operators[operator.name] = operator
    return operators
