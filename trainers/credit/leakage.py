"""Leakage of a task's answer into prompts: which turns saw it, and which prompts hold it without a
right to. Pure Python."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...agents.text.answers import normalise
from ...agents.types import Task, Turn
from ...rollouts.types import Episode


def saw_answer(episode: Episode) -> set[int]:
    """Indices of turns that saw the answer, or read (however indirectly) a turn that did."""
    informed: set[int] = set()
    for turn in episode.turns:  # ordered by index, and a turn reads earlier ones only
        if turn.saw_gold or informed & set(turn.reads):
            informed.add(turn.index)
    return informed


def answer_spellings(task: Task) -> list[str]:
    """The spellings of a task's answer that a text must not hold."""
    answers = task.answer if isinstance(task.answer, (list, tuple)) else [task.answer]
    parts = [
        part
        for answer in answers
        for part in (answer if isinstance(answer, (list, tuple)) else [answer])
        if part is not None
    ]
    return list(
        dict.fromkeys(
            form for part in parts for form in (str(part).strip(), normalise(str(part))) if form
        )
    )


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Does the text hold one of these answers, as a whole word or number?"""
    return any(
        re.search(rf"(?<![\w.]){re.escape(a)}(?!\w|[.,]\d)", text, re.IGNORECASE) for a in answers
    )


def leaks_answer(episode: Episode, turn: Turn, opening: str = "") -> bool:
    """Does the answer stand in a turn's prompt although nothing the agent may read holds it?

    The agent may read the task itself (prompt, public meta), its own opening, and earlier turns of
    the episode that did not see the answer: an agent may well have worked it out.
    """
    answers, public = answer_spellings(episode.task), episode.task.public()
    if not answers or not contains_answer("\n".join(m.content for m in turn.messages), answers):
        return False
    informed = saw_answer(episode)
    earlier = [t.text for t in episode.turns if t.index < turn.index and t.index not in informed]
    known = "\n".join([public.prompt, *map(str, public.meta.values()), opening, *earlier])
    return not contains_answer(known, answers)
