"""Episodes, judgements and helpers for tests of the parts of feedback methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from marlora.agents.state import Param
from marlora.agents.transcript import Operation
from marlora.agents.types import Message, Reward, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.feedback.backward import Case
from marlora.trainers.feedback.evaluators import Judgement
from marlora.trainers.feedback.graph import Graph
from marlora.trainers.feedback.helpers import Helpers, Question
from marlora.trainers.feedback.targets import Target


class ScriptedHelpers(Helpers):
    """Helpers whose replies come from a function; `asked` are the questions, `batches` how many
    came at once."""

    def __init__(self, prompts: dict[str, str], reply: Callable[[Question], str | None]) -> None:
        self.prompts, self.reply, self.counts = prompts, reply, Counter()  # type: ignore[assignment]
        self.asked: list[Question] = []
        self.batches: list[int] = []

    def ask(self, questions: Sequence[Question]) -> list[str | None]:
        self.asked += questions
        self.batches += [len(questions)] if questions else []
        return [self.reply(question) for question in questions]


def turn(index: int, agent: str, text: str, reads: Sequence[int] = (), **fields: Any) -> Turn:
    """A taken turn with a system message that names its agent."""
    messages = (Message("system", f"You are {agent}."), Message("user", f"say {text}"))
    return Turn(index, agent, messages, tuple(reads), text=text, **fields)


def operation(index: int, name: str, text: str, reads: Sequence[int] = ()) -> Operation:
    return Operation(index, name, tuple(reads), text)


def episode(
    *nodes: Turn | Operation,
    task: str = "t1",
    output: str | None = None,
    output_from: Sequence[int] = (),
    score: float = 0.0,
    error: str | None = None,
    answer: str = "7",
) -> Episode:
    """An episode of these turns and operations."""
    last = nodes[-1].text if nodes else None
    return Episode(
        f"e-{task}",
        task,
        Task(task, f"question {task}", answer),
        turns=tuple(n for n in nodes if isinstance(n, Turn)),
        operations=tuple(n for n in nodes if isinstance(n, Operation)),
        output=None if error else last if output is None else output,
        output_from=tuple(output_from),
        rewards=() if error else (Reward("right", score),),
        error=error,
        stop_reason="error" if error else "done",
    )


def case(of: Episode, text: str = "wrong", score: float = 0.0, gold: bool = False) -> Case:
    judgement = Judgement(score, text, f"judged {of.task.id}", gold)
    return Case(of, Graph(of), judgement)


def target(agent: str, value: str = "do it") -> Target:
    return Target(Param(f"{agent}.prompt", value, "text", agent), value)


def chain_of(task: str, *agents: str, **fields: Any) -> Episode:
    """Turns of these agents, each reading the one before."""
    turns = [
        turn(k, agent, f"{agent} on {task}", [k - 1] if k else []) for k, agent in enumerate(agents)
    ]
    return episode(*turns, task=task, **fields)
