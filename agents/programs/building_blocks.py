"""Building blocks: summarise, predict, reflect (and execute), debate, aggregate, in this order; how
much of each is an integer that a method may change.

The topologies of MASS (Zhou et al., "Multi-Agent Design: Optimizing Agents with Better Prompts and
Topologies", arXiv 2502.02533). The authors gave no code, so the assembly is ours: a debator answers
once per round, with all answers so far in view, and its answer joins them; without an aggregator
the last answer is the output. Executing runs the program of an answer on the task's public tests,
in the sandbox, and shows the reflector what came of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import Agent
from ..concurrency import gather
from ..execution import Limits, answered
from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.tags import block, inside
from ..text.templates import render
from ..transcript import Operation
from ..types import SettingError, Task, Turn, nearest

# What each block may be; the first value leaves it out.
VALUES: Mapping[str, tuple[int, ...]] = {
    "summarize": (0, 1, 2, 3, 4),
    "reflect": (0, 1, 2, 3, 4),
    "debate": (0, 1, 2, 3, 4),
    "aggregate": (1, 3, 5, 7, 9),
    "execute": (0, 1),
}
# who speaks in a block, beside the predictor
SPEAKERS = {
    "summarize": "summarizer",
    "reflect": "reflector",
    "debate": "debator",
    "aggregate": "aggregator",
    "execute": "reflector",
}
CHECKS = Limits(seconds=5.0, cpu_seconds=5)

SUMMARISE = "Sum up what matters for this task; do not solve it.\n{task}{summary}"
PREDICT = "{prompt}{summary}{attempt}"
ATTEMPT = "\n\n(Attempt {number} of {count}: go your own way.)"
REFLECT = (
    "Is this answer to the task right? Say what is wrong with it and how to put it right; end with"
    " the word yes or no between the tag <CORRECT> and its closing tag.\n{task}\n{answer}"
    "{execution}"
)
REVISE = "{prompt}{summary}\n\nYour answer was:\n{answer}\n\n{feedback}\n\nAnswer the task again."
DEBATE = (
    "{prompt}\n\nThese answers were given:\n{answers}\n\nWeigh them against one another and answer"
    " the task."
)
AGGREGATE = "{prompt}\n\nThese answers were given:\n{answers}\n\nGive the one they agree on most."
TEMPLATES = {
    "summarise": ("task", "summary"),
    "predict": ("prompt", "summary", "attempt"),
    "attempt": ("number", "count"),
    "reflection": ("task", "answer", "execution"),
    "revise": ("prompt", "summary", "answer", "feedback"),
    "debating": ("prompt", "answers"),
    "aggregation": ("prompt", "answers"),
}


@trusted("system")
@dataclass
class BuildingBlocks(System):
    """A predictor, and an agent for every block that the team can have; blocks that are given no
    agent stay out.

    The integers are params of these names, so a method may change them: `summarize`, `reflect` and
    `debate` are rounds, `aggregate` is the number of parallel predictors, `execute` 0 or 1. A
    debate has at least two predictors. All agents of one kind are one agent with one prompt, in a
    chat of its own each time.

    Args:
        summarizer, reflector, debator, aggregator: agents by name; "" is none. The one that is left
            is the predictor.
        summarise, predict, reflection, revise, debating, aggregation: the prompts, as templates.
            Fields: `prompt` (the task's), `task`, `summary`, `answer`, `execution`, `feedback`,
            `answers` (blocks between tags, "" where there is none), `attempt`.
        attempt: what parallel predictors are told beside, so that they differ at temperature 0;
            fields `number` and `count`.
    """

    summarizer: str = ""
    reflector: str = ""
    debator: str = ""
    aggregator: str = ""
    summarize: int = setting("rounds of summaries", 0, at_least=0)
    reflect: int = setting("rounds of reflection on every answer", 0, at_least=0)
    debate: int = setting("rounds of debate", 0, at_least=0)
    aggregate: int = setting("parallel predictors", 1, at_least=1)
    execute: int = setting("1: the reflector is shown what the answer's program does", 0)
    summarise: str = SUMMARISE
    predict: str = PREDICT
    attempt: str = ATTEMPT
    reflection: str = REFLECT
    revise: str = REVISE
    debating: str = DEBATE
    aggregation: str = AGGREGATE

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        named = [name for role in dict.fromkeys(SPEAKERS.values()) if (name := getattr(self, role))]
        for name in named:
            if name not in names:
                raise SettingError(f"BuildingBlocks: {name!r} is no agent; {nearest(name, names)}")
        left = [name for name in names if name not in named]
        if len(left) != 1 or len({*named}) < len(named):
            raise SettingError(
                "BuildingBlocks: one agent besides the summarizer, reflector, debator and"
                " aggregator expected, the predictor, and each in one place; got"
                f" {', '.join(names)}"
            )
        self.predictor = left[0]
        for name, fields in TEMPLATES.items():
            render(getattr(self, name), dict.fromkeys(fields, ""), setting=name)
        self.shape({})

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that this team can have."""
        return tuple(name for name in VALUES if getattr(self, SPEAKERS[name]))

    def params(self) -> tuple[Param, ...]:
        """The agents' params, and the integer of every block that the team can have."""
        own = [
            Param(
                name,
                getattr(self, name),
                "number",
                role=f"block {name}",
                legal=functools.partial(self._refused, name),
            )
            for name in self.blocks
        ]
        return (*super().params(), *own)

    def _refused(self, name: str, value: Any) -> str | None:
        """Why a block cannot be this; None if it can."""
        if name not in self.blocks and value != VALUES[name][0]:
            return f"this team has no {SPEAKERS[name]}"
        known = VALUES[name]
        return None if value in known else f"expected one of {known}, got {value!r:.60}"

    def conflict(self, values: Mapping[str, Any]) -> str | None:
        """Blocks that need one another."""
        try:
            self.shape(values)
        except SettingError as error:
            return str(error)
        return None

    def shape(self, values: Mapping[str, Any]) -> dict[str, int]:
        """The integer of every block: of these values, else the system's own. Raises
        `SettingError`."""
        found = {name: values.get(name, getattr(self, name)) for name in VALUES}
        for name, value in found.items():
            fault = self._refused(name, value)
            if fault:
                raise SettingError(f"{name}: {fault}")
        if found["execute"] and not found["reflect"]:
            raise SettingError("execute: 1 without reflect: nobody would be shown what came of it")
        return found

    async def run(self, task: Task, team: Team) -> Turn:
        shape = self.shape(team.values)
        summary = await self._summary(task, team, shape["summarize"])
        answers = await self._predictions(task, team, predictors(shape), summary)
        answers = await self._reflected(task, team, shape, answers, summary)
        for _ in range(shape["debate"]):
            answers.append(await self._weighed("debating", task, team[self.debator], answers))
        if shape["aggregate"] == 1:
            return answers[-1]
        return await self._weighed("aggregation", task, team[self.aggregator], answers)

    async def _summary(self, task: Task, team: Team, rounds: int) -> Turn | None:
        last: Turn | None = None
        for _ in range(rounds):
            fields = {"task": block("TASK", task.prompt), "summary": _quoted("SUMMARY", last)}
            text = render(self.summarise, fields, setting="summarise")
            last = await team[self.summarizer].fresh().reply(text, reads=[last] if last else [])
        return last

    async def _predictions(
        self, task: Task, team: Team, count: int, summary: Turn | None
    ) -> list[Turn]:
        def prompt(number: int) -> str:
            fields: dict[str, Any] = {"number": number, "count": count}
            attempt = render(self.attempt, fields, setting="attempt") if count > 1 else ""
            fields = {"prompt": task.prompt, "summary": _quoted("SUMMARY", summary)}
            return render(self.predict, {**fields, "attempt": attempt}, setting="predict")

        reads = [summary] if summary else []
        predictor = team[self.predictor]
        return await gather(
            predictor.fresh().reply(prompt(number), reads=reads) for number in range(1, count + 1)
        )

    async def _reflected(
        self,
        task: Task,
        team: Team,
        shape: Mapping[str, int],
        answers: Sequence[Turn],
        summary: Turn | None,
    ) -> list[Turn]:
        """The answers after rounds of reflection; one that the reflector calls correct stays."""
        found, open_ = list(answers), list(range(len(answers)))
        for _ in range(shape["reflect"]):
            given = [found[at] for at in open_]
            runs: list[Operation | None] = [None] * len(given)
            if shape["execute"]:
                texts = await gather(self._executed(task, team, answer) for answer in given)
                runs = [
                    team.record("execution", text, reads=[answer])
                    for answer, text in zip(given, texts, strict=True)
                ]
            feedback = await gather(
                self._reflection(task, team, answer, run)
                for answer, run in zip(given, runs, strict=True)
            )
            wrong = [
                (at, criticism)
                for at, criticism in zip(open_, feedback, strict=True)
                if (inside(criticism.text, "CORRECT") or "").lower() != "yes"
            ]
            revised = await gather(
                self._revision(task, team, found[at], criticism, summary) for at, criticism in wrong
            )
            open_ = [at for at, _ in wrong]
            for at, turn in zip(open_, revised, strict=True):
                found[at] = turn
        return found

    async def _executed(self, task: Task, team: Team, answer: Turn) -> str:
        """What the program of an answer does on the task's public tests, a line per test."""
        tests = [str(test) for test in task.meta.get("tests") or ()]
        if not tests:
            raise SettingError(
                f"execute: task {task.id!r} has no public tests (meta.tests); set execute to 0"
            )
        verdict = await team.check(*answered(task, answer.text, tests), CHECKS)
        results = zip(tests, verdict.results, strict=True)
        return "\n".join(f"{test}: {why or 'passed'}" for test, why in results)

    async def _reflection(
        self, task: Task, team: Team, answer: Turn, run: Operation | None
    ) -> Turn:
        fields = {
            "task": block("TASK", task.prompt),
            "answer": block("ANSWER", answer.text),
            "execution": _quoted("EXECUTION", run),
        }
        text = render(self.reflection, fields, setting="reflection")
        reads: list[Turn | Operation] = [answer, *([run] if run else [])]
        return await team[self.reflector].fresh().reply(text, reads=reads)

    async def _revision(
        self, task: Task, team: Team, answer: Turn, criticism: Turn, summary: Turn | None
    ) -> Turn:
        fields = {
            "prompt": task.prompt,
            "summary": _quoted("SUMMARY", summary),
            "answer": block("ANSWER", answer.text),
            "feedback": block("FEEDBACK", criticism.text),
        }
        text = render(self.revise, fields, setting="revise")
        reads = [answer, criticism, *([summary] if summary else [])]
        return await team[self.predictor].fresh().reply(text, reads=reads)

    async def _weighed(
        self, template: str, task: Task, agent: Agent, answers: Sequence[Turn]
    ) -> Turn:
        """An agent's answer with these in view."""
        quotes = "\n".join(block("ANSWER", answer.text) for answer in answers)
        fields = {"prompt": task.prompt, "answers": quotes}
        text = render(getattr(self, template), fields, setting=template)
        return await agent.fresh().reply(text, reads=list(answers))


def predictors(shape: Mapping[str, int]) -> int:
    """The parallel predictors of a topology: `aggregate`, and at least two in a debate."""
    return max(shape["aggregate"], 2 if shape["debate"] else 1)


def _quoted(name: str, said: Turn | Operation | None) -> str:
    return "\n" + block(name, said.text) if said else ""
