"""Demonstrations of agents: worked examples taken from successful turns, and labelled ones written
from a task's answer; how they are found (DSPy's BootstrapFewShot) and put into a set. Pure Python.

A demonstration is a piece of chat, user and assistant in turn, that ends with the agent's answer.
`NAME.demos` holds the messages of all of an agent's demonstrations, one after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

from .....agents.seeds import derive_seed
from .....agents.text.templates import render
from .....agents.types import Message, Task, Turn
from .....rollouts.types import Episode, TurnKey
from ....credit.leakage import contains_answer

T = TypeVar("T")


@dataclass(frozen=True)
class Demo:
    """A demonstration of one agent.

    Args:
        task: id of the task it was made of. prompt: that task's.
        messages: user and assistant in turn; the last one is the agent's answer.
    """

    task: str
    prompt: str
    messages: tuple[Message, ...]

    def is_of(self, task: Task) -> bool:
        """Was it made of this task, or of one that asks the same?"""
        return task.id == self.task or task.prompt == self.prompt


Demos = Mapping[str, Demo]  # a run's demonstrations, one per agent
Attempt = Callable[[Sequence[Task], int], Sequence[Demos]]


def worked_example(
    turn: Turn, opening: Sequence[Message], task: str = ""
) -> tuple[Message, ...] | None:
    """A turn's chat after the agent's opening (system message, demonstrations), with its answer.

    None where that is no chat of user and assistant in turn, where the answer is empty, or where
    a demonstration in the opening asks the `task` itself (its prompt): then the agent may have
    copied.
    """
    chat, head = turn.messages, tuple(opening)
    chat = chat[len(head) :] if chat[: len(head)] == head else chat
    if not chat or not turn.text.strip() or len(chat) % 2 == 0:
        return None
    if any(m.role != role for m, role in zip(chat, cycle(("user", "assistant")), strict=False)):
        return None
    if task and any(m.role == "user" and contains_answer(m.content, [task]) for m in head):
        return None
    plain = tuple(Message(m.role, m.content) for m in chat)
    return (*plain, Message("assistant", turn.text))


def demos_of(
    episode: Episode, kept: Collection[TurnKey], openings: Mapping[str, Sequence[Message]]
) -> dict[str, Demo]:
    """One demonstration per agent that has a kept turn in the episode, see `one_call`.

    Args:
        kept: turns that may be shown.
        openings: by agent, the messages at the head of all its chats.
    """
    calls: dict[str, list[Demo]] = {}
    for turn in episode.turns:
        if (episode.id, turn.index, turn.sibling) not in kept:
            continue
        messages = worked_example(turn, openings.get(turn.agent, ()), episode.task.prompt)
        if messages is not None:
            demo = Demo(episode.task.id, episode.task.prompt, messages)
            calls.setdefault(turn.agent, []).append(demo)
    return {agent: one_call(agent, own) for agent, own in calls.items()}


def one_call(agent: str, calls: Sequence[Demo]) -> Demo:
    """One of an agent's calls in a run: the last with probability 1/2, else one of the earlier ones
    with equal chances; drawn by a hash of their content."""
    if len(calls) == 1:
        return calls[0]
    rng = random.Random(derive_seed(agent, [[m.content for m in c.messages] for c in calls]))
    return rng.choice(calls[:-1]) if rng.random() < 0.5 else calls[-1]


def bootstrap_sets(
    orders: Sequence[tuple[Sequence[Task], int]], rounds: int, attempt: Attempt
) -> list[list[Demos]]:
    """For each order of tasks, the demonstrations of its first `count` tasks whose run succeeds,
    each tried up to `rounds` times.

    Args:
        orders: tasks, and how many successes are wanted of them.
        attempt: plays tasks for the given time (0: the first) and gives each run's demonstrations,
            none for a run that failed.

    All orders go on side by side, and as many tasks of an order are tried at once as successes are
    missing, so none is tried that would not be if they were tried one after the other.
    """
    successes: list[list[Demos]] = [[] for _ in orders]
    places = [0] * len(orders)
    while True:
        chunks: list[Sequence[Task]] = []
        for at, (tasks, count) in enumerate(orders):
            chunks.append(tasks[places[at] : places[at] + max(count - len(successes[at]), 0)])
            places[at] += len(chunks[at])
        if not any(chunks):
            return successes
        done: dict[str, Demos] = {}
        for number in range(rounds):
            every = {task.id: task for chunk in chunks for task in chunk}
            left = [task for task in every.values() if task.id not in done]
            if left:
                runs = attempt(left, number)
                done |= {t.id: demos for t, demos in zip(left, runs, strict=True) if demos}
        for own, chunk in zip(successes, chunks, strict=True):
            own += [done[task.id] for task in chunk if task.id in done]


@dataclass(frozen=True)
class DemoTemplate:
    """How a labelled demonstration of an agent is written: templates with the fields `prompt`,
    `answer` and every key of the task's meta.

    DSPy's are a row of the data set under the names of a module's signature; an agent has no
    signature, so its settings say how it is asked.
    """

    user: str = "{prompt}"
    assistant: str = "{answer}"

    def demo(self, agent: str, task: Task) -> Demo:
        """The task with its answer as this agent would be asked and should reply."""
        fields = {**task.meta, "prompt": task.prompt, "answer": task.answer}

        def text(part: str) -> str:
            setting = f"labeled_demos.{agent}.{part}"
            return render(
                getattr(self, part), fields, setting=setting, context=f" for task {task.id!r}"
            )

        messages = (Message("user", text("user")), Message("assistant", text("assistant")))
        return Demo(task.id, task.prompt, messages)


@dataclass(frozen=True)
class DemoSets:
    """Makes sets of demonstrations: what every candidate of a search is.

    Args:
        agents: the names of the team's agents.
        templates: by agent, how its labelled demonstrations are written; agents without one get
            none.
        max_labeled: most demonstrations of an agent where labelled ones fill up.
        seed: which tasks the labelled ones are of follows from it.
    """

    agents: Sequence[str]
    templates: Mapping[str, DemoTemplate]
    max_labeled: int
    seed: int = 0

    def labeled(self, tasks: Sequence[Task]) -> dict[str, list[Demo]]:
        """By agent with a template, up to `max_labeled` demonstrations of random tasks."""
        return {agent: self._drawn(agent, tasks, self.max_labeled) for agent in self.templates}

    def filled(
        self, successes: Sequence[Demos], tasks: Sequence[Task], max_bootstrapped: int
    ) -> dict[str, list[Demo]]:
        """By agent, its first `max_bootstrapped` bootstrapped demonstrations, then labelled ones of
        random other tasks up to `max_labeled` in all."""
        used = [demo for run in successes for demo in run.values()]
        others = [task for task in tasks if not any(demo.is_of(task) for demo in used)]
        sets: dict[str, list[Demo]] = {}
        for agent in self.agents:
            own = [run[agent] for run in successes if agent in run][:max_bootstrapped]
            sets[agent] = own + self._drawn(agent, others, self.max_labeled - len(own))
        return sets

    def _drawn(self, agent: str, tasks: Sequence[Task], count: int) -> list[Demo]:
        """Labelled demonstrations of `count` random tasks (all, if there are fewer). Every agent
        draws from all of them: what one agent took is not lost to the next."""
        template = self.templates.get(agent)
        if template is None or count < 1:
            return []
        rng = random.Random(derive_seed(self.seed, "labeled demos", agent))
        return [template.demo(agent, t) for t in rng.sample(tasks, min(count, len(tasks)))]


def demo_values(sets: Mapping[str, Sequence[Demo]]) -> dict[str, list[dict[str, str]]]:
    """`NAME.demos` by name: the messages of these demonstrations."""
    return {
        f"{agent}.demos": [
            {"role": m.role, "content": m.content} for demo in demos for m in demo.messages
        ]
        for agent, demos in sets.items()
    }


def without_task(sets: Mapping[str, Sequence[Demo]], task: Task) -> dict[str, list[Demo]]:
    """The demonstrations that were not made of this task: a run must not be shown its own
    answer."""
    return {a: [d for d in demos if not d.is_of(task)] for a, demos in sets.items()}


# candidates of the random search, numbered as in DSPy's code

ZERO_SHOT, LABELED, UNSHUFFLED = -3, -2, -1
KINDS = ("zero-shot", "labeled", "unshuffled", "shuffled")


def candidate_numbers(kinds: Collection[str], num_candidate_programs: int) -> list[int]:
    """The numbers of the candidates in the order they are tried: -3 without demonstrations, -2 with
    labelled ones, -1 bootstrapped from the tasks in order, 0, 1, ... from shuffled tasks."""
    fixed = [
        n for n, kind in zip((ZERO_SHOT, LABELED, UNSHUFFLED), KINDS, strict=False) if kind in kinds
    ]
    return fixed + list(range(num_candidate_programs if "shuffled" in kinds else 0))


def candidate_name(number: int) -> str:
    """What a candidate is called in metrics and reports."""
    return KINDS[number - ZERO_SHOT] if number < 0 else f"shuffled {number}"


def drawn_tasks(tasks: Sequence[T], number: int, seed: int) -> list[T]:
    """The tasks in the order in which this candidate tries them."""
    order = list(tasks)
    if number >= 0:
        random.Random(derive_seed(seed, "candidate", number, "order")).shuffle(order)
    return order


def drawn_size(max_bootstrapped: int, number: int, seed: int) -> int:
    """How many demonstrations this candidate bootstraps: all, or (shuffled) 1 to all with equal
    chances."""
    if number < 0:
        return max_bootstrapped
    rng = random.Random(derive_seed(seed, "candidate", number, "size"))
    return rng.randint(1, max_bootstrapped)
