"""The history of a method's updates, and what of it the rewriter is shown: nothing, past values,
the best values with scores, failed proposals, or the last values with their feedback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...agents.text.tags import block
from ...agents.types import to_json
from ..values.memory import Memory
from .backward import Feedback
from .targets import as_text

# statuses of an update
ADOPTED, REJECTED, SAME = "adopted", "rejected", "unchanged"

Record = Mapping[str, Any]
View = Callable[[Sequence[Record], str], str]  # (updates, name of a param) -> text of the prompt


class History(Memory):
    """Every proposal of the run that could be read, in order.

    An update has `step`, `values` (by name of a param), `status` (`adopted`, `rejected` or
    `unchanged`), `score` (the mean on the validation tasks; None where these were not all played),
    `why` (what the gate said), `note` (the rewriter's words), `feedback` (by param, what it was
    rewritten by), `before` (the values that the feedback is about) and `responses` (outputs of the
    step's episodes, under the values before).
    """

    def __init__(self, name: str = "history") -> None:
        super().__init__(name)
        self["updates"] = []

    @property
    def updates(self) -> list[dict[str, Any]]:
        """All updates, oldest first."""
        return list(self["updates"])

    def add(
        self,
        step: int,
        values: Mapping[str, Any],
        status: str,
        *,
        score: float = math.nan,
        why: str = "",
        note: str = "",
        feedback: Mapping[str, Sequence[Feedback]] | None = None,
        before: Mapping[str, Any] | None = None,
        responses: Sequence[str] = (),
    ) -> None:
        """Add an update."""
        said = {name: [f.text for f in own] for name, own in (feedback or {}).items() if own}
        update = {
            "step": step,
            "values": to_json(values),
            "status": status,
            "score": None if math.isnan(score) else score,
            "why": why,
            "note": note,
            "feedback": said,
            "before": to_json(before or {}),
            "responses": list(responses),
        }
        self["updates"] = [*self.updates, update]


def no_history(updates: Sequence[Record], name: str) -> str:
    """Nothing is shown."""
    return ""


def past_values(
    window: int = 0, *, responses: bool = False, none: str = "", head: str = ""
) -> View:
    """Lines `Iteration i: value`, i from 1, of the values that updates gave a param; one that a
    gate rejected is marked so (REVOLVE, arXiv:2412.03092).

    Args:
        window: only the last so many; 0: all. Numbers go on.
        responses: also the team's outputs from which the value was made.
        none: stands there while there is no update; `head` before the list where there is one.
    """

    def view(updates: Sequence[Record], name: str) -> str:
        own = [update for update in updates if name in update["values"]]
        lines = []
        for number, update in list(enumerate(own, 1))[-window:]:
            mark = f" (rejected: {update['why']})" if update["status"] == REJECTED else ""
            lines.append(f"Iteration {number}: {update['values'][name]}{mark}")
            if responses:
                lines += [f"Response before it: {text}" for text in update["responses"]]
        return head + block("PAST_ITERATIONS", "\n".join(lines)) if lines else none

    return view


def best_values(count: int = 3) -> View:
    """The best values with their scores, best first, of equal ones the later (OPRO,
    arXiv:2309.03409; LLM-AutoDiff, arXiv:2501.16673)."""

    def view(updates: Sequence[Record], name: str) -> str:
        scored = {
            str(u["values"][name]): u["score"]
            for u in updates
            if name in u["values"] and u["status"] != REJECTED and u["score"] is not None
        }
        ranked = sorted(reversed(scored.items()), key=lambda item: -item[1])[:count]
        return "\n".join(block("BEST", f"score {score:.4f}: {value}") for value, score in ranked)

    return view


def failed_proposals(count: int = 5, *, show_values: bool = False) -> View:
    """What was proposed and rejected since the last adoption: the rewriter's words on it and what
    the gate said; the values only if `show_values` (LLM-AutoDiff hides them)."""

    def view(updates: Sequence[Record], name: str) -> str:
        failed: list[str] = []
        for update in updates:
            if update["status"] == ADOPTED:
                failed = []
            elif update["status"] == REJECTED and name in update["values"]:
                value = f"{update['values'][name]}\n" if show_values else ""
                failed.append(block("FAILED", f"{value}{update['note']}\n{update['why']}".strip()))
        return "\n".join(failed[-count:])

    return view


def last_updates(count: int) -> View:
    """The last values that were rewritten, each with the feedback that it got: a memory of `count`
    entries, first in, first out (Trace, arXiv:2406.16218). 0 shows nothing."""

    def view(updates: Sequence[Record], name: str) -> str:
        own = [update for update in updates if name in update["before"]]
        return "\n".join(
            block("VALUE", as_text(update["before"][name]))
            + "\n"
            + block("FEEDBACK", "\n".join(update["feedback"].get(name, ())))
            for update in (own[-count:] if count else [])
        )

    return view


def views(*shown: View) -> View:
    """Several views, one below the other."""

    def view(updates: Sequence[Record], name: str) -> str:
        return "\n".join(text for each in shown if (text := each(updates, name)))

    return view
