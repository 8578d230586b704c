"""Experience: what was tried from a program, and which tasks it failed, in words for a proposer."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from ....agents.programs.program import PROGRAM
from ....agents.types import Task
from ....rollouts.types import Episode
from ...values.search import Candidate

NOTE = (
    "Take past failures into account and do not repeat them: change the way of thinking, not only"
    " the wording."
)


def succeeded(before: float, after: float) -> bool:
    """Whether an edit counts as a success: strictly better."""
    return after > before


def same_edit(one: str, other: str) -> bool:
    """Whether two modifications are one text, case and white space aside."""
    return one.split() == other.split() or one.casefold().split() == other.casefold().split()


def experience(parent: Candidate, children: Sequence[Candidate]) -> str:
    """All edits tried from a program, successes too: none is to be tried again. A child that was
    kept without a measurement was not tried."""
    lines = [f"Score of this program: {percent(parent.mean)}"]
    for child in children:
        if child.fault:
            end = f" (could not be used: {child.fault})"
        elif not child.scores:
            continue
        elif succeeded(parent.mean, child.mean):
            end = f" (success: {percent(child.mean)})"
        else:
            end = f" (failure: {percent(child.mean)})"
        lines.append(f"- Prohibited, tried already: {child.note}{end}")
    return "\n".join(lines if len(lines) == 1 else [*lines, NOTE])


def percent(score: float) -> str:
    return "unknown" if math.isnan(score) else f"{100 * score:.1f} %"


def failures(
    tasks: Sequence[Task],
    episodes: Sequence[Episode],
    scores: Mapping[str, float],
    count: int,
    rng: random.Random,
) -> str:
    """Up to `count` tasks that were not fully solved, drawn at random: question, right answer,
    the program's, and how the program ended if it gave none. `tasks` hold the answers."""
    answers = {task.id: task.answer for task in tasks}
    wrong = [e for e in episodes if e.parent is None and scores.get(e.task.id, 0.0) < 1]
    first = list({episode.task.id: episode for episode in reversed(wrong)}.values())[::-1]
    chosen = rng.sample(first, min(count, len(first)))
    return "\n\n".join(case(episode, answers[episode.task.id]) for episode in chosen)


def case(episode: Episode, answer: str) -> str:
    """A task in words: question, right answer, the program's, and how it ended if it gave none."""
    return (
        f"Question: {episode.task.prompt}\nRight answer: {answer}\n"
        f"Answer of the program: {episode.output or ''}" + _ended(episode)
    )


def _ended(episode: Episode) -> str:
    fault = fault_of(episode)
    return f"\nIt gave none: {fault}" if fault else ""


def fault_of(episode: Episode) -> str:
    """Why a program gave no answer to a task; "" if it gave one."""
    if episode.error is not None:
        return episode.error
    return next((o.error for o in reversed(episode.operations) if o.name == PROGRAM), "")


def common_fault(episodes: Sequence[Episode]) -> str:
    """The most frequent reason, if the program gave no answer to any of these tasks; else ""."""
    faults = [fault_of(each) for each in episodes if each.parent is None]
    return Counter(faults).most_common(1)[0][0] if faults and all(faults) else ""
