"""Rewriters: how feedback becomes new values of params: one call per param, or one for all of them
together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...agents.text.tags import between, block, inside, nested, unescape
from .backward import ByParam, Feedback
from .helpers import UNREADABLE, Helpers, Question
from .targets import Target, as_text

Constraints = Sequence[str]


@dataclass(frozen=True)
class Proposal:
    """New values by name of a param, as the rewriter said them; empty if nothing could be read.
    `note`: its words on them."""

    values: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class Rewriter(Protocol):
    """Proposes new values."""

    def propose(
        self,
        helpers: Helpers,
        targets: Sequence[Target],
        feedback: ByParam,
        history: Callable[[str], str],
        number: int,
    ) -> Proposal:
        """The proposal of this number, from 0, in this step. `history(NAME)`: what the rewriter is
        shown of a param's past."""


@dataclass(frozen=True)
class PerParam:
    """One call per param, all at once; params without feedback are left out unless `always`.

    Args:
        helper: its name.
        constraints: sentences that a new value has to obey.
        tags: where the reply holds the value: the first of these that it has.
        temperatures: of the proposals of a step in turn, the last for those beyond; empty: the
            helper's own.
        always: also ask about params that nothing was said of.
        note: a tag whose text is the rewriter's words on its proposal, "" for none.
        scores: each feedback stands with its task, its place among the calls, and its score.

    Prompts: `rewrite_system`, and `rewrite` with `{role}`, `{value}`, `{peers}` (the other params
    of its agent, a block each), `{others}` (those of other agents and of the system), `{feedback}`
    (a block per feedback, with its conversation), `{history}` and `{constraints}`.
    """

    helper: str = "optimizer"
    constraints: Constraints = ()
    tags: tuple[str, ...] = ("IMPROVED_VARIABLE",)
    temperatures: tuple[float, ...] = ()
    always: bool = False
    note: str = ""
    scores: bool = False

    def propose(
        self,
        helpers: Helpers,
        targets: Sequence[Target],
        feedback: ByParam,
        history: Callable[[str], str],
        number: int,
    ) -> Proposal:
        asked = [t for t in targets if self.always or feedback[t.name]]
        questions = [
            Question(
                self.helper,
                helpers.prompt("rewrite_system"),
                helpers.prompt(
                    "rewrite",
                    role=target.role,
                    value=block("VARIABLE", as_text(target.value)),
                    peers=_others("PEER", target, targets, same_agent=True),
                    others=_others("OTHER", target, targets, same_agent=False),
                    feedback=feedback_blocks(feedback[target.name], scores=self.scores),
                    history=history(target.name),
                    constraints=numbered_list(self.constraints),
                ),
                f"{self.helper}/{target.name}/{number}",
                saw_gold=any(each.saw_gold for each in feedback[target.name]),
                temperature=temperature_of(self.temperatures, number),
            )
            for target in asked
        ]
        values, notes = dict[str, Any](), []
        for target, reply in zip(asked, helpers.ask(questions), strict=True):
            text = None if reply is None else inside(reply, *self.tags)
            if text:
                values[target.name] = cast(text, target.value)
                notes.append(inside(reply or "", self.note) or "" if self.note else "")
            else:
                helpers.counts[UNREADABLE] += reply is not None
        return Proposal(values, "\n".join(note for note in notes if note))


@dataclass(frozen=True)
class Jointly:
    """One call for all params that something was said of (OptoPrime of Trace, arXiv:2406.16218):
    the reply has one JSON object `{"reasoning": ..., "suggestion": {NAME: VALUE}}` between the tag
    `SUGGESTION` and its closing tag, so that no text that it quotes is taken for one.

    A text is cast to the type of the param's value (`"5"` for a number, `"False"` for a flag);
    names that were not asked about are ignored. An object with `reasoning` and no suggestion
    changes nothing; anything else is unreadable.

    Prompts: `rewrite_system`, and `rewrite` with `{variables}` (name, role, what its values look
    like, value), `{feedback}`, `{history}` and `{constraints}`.
    """

    helper: str = "optimizer"
    constraints: Constraints = ()
    temperatures: tuple[float, ...] = ()

    def propose(
        self,
        helpers: Helpers,
        targets: Sequence[Target],
        feedback: ByParam,
        history: Callable[[str], str],
        number: int,
    ) -> Proposal:
        asked = [target for target in targets if feedback[target.name]]
        if not asked:
            return Proposal()
        given = list(dict.fromkeys(each for target in asked for each in feedback[target.name]))
        variables = [
            f"{t.name}: {t.role}; {t.constraint}\n{block('VALUE', as_text(t.value))}" for t in asked
        ]
        past = {t.name: history(t.name) for t in asked}
        question = Question(
            self.helper,
            helpers.prompt("rewrite_system"),
            helpers.prompt(
                "rewrite",
                variables=nested("VARIABLES", "\n".join(variables)),
                feedback=feedback_blocks(given),
                history="\n".join(f"{name}:\n{text}" for name, text in past.items() if text),
                constraints=numbered_list(self.constraints),
            ),
            f"{self.helper}/all/{number}",
            saw_gold=any(each.saw_gold for each in given),
            temperature=temperature_of(self.temperatures, number),
        )
        (reply,) = helpers.ask([question])
        text = between(reply or "", "SUGGESTION") or ""
        found = json_object(text, "suggestion") or json_object(text, "reasoning")
        suggestion = (found or {}).get("suggestion") or {}
        if not isinstance(suggestion, Mapping):
            found = None
        if found is None:
            helpers.counts[UNREADABLE] += reply is not None
            return Proposal()
        values = {
            target.name: cast(_unescaped(suggestion[target.name]), target.value)
            for target in asked
            if target.name in suggestion
        }
        return Proposal(values, str(found.get("reasoning", "")))


def _others(name: str, target: Target, targets: Sequence[Target], same_agent: bool) -> str:
    """The other params that are rewritten too, of the same agent or of others, a block each."""
    return "\n".join(
        f"{other.role}:\n{block(name, as_text(other.value))}"
        for other in targets
        if other.name != target.name
        and (bool(target.param.agent) and other.param.agent == target.param.agent) == same_agent
    )


def _unescaped(value: Any) -> Any:
    """JSON with all its texts unescaped."""
    if isinstance(value, str):
        return unescape(value)
    if isinstance(value, list):
        return [_unescaped(each) for each in value]
    if isinstance(value, dict):
        return {name: _unescaped(each) for name, each in value.items()}
    return value


def feedback_blocks(feedback: Sequence[Feedback], scores: bool = False) -> str:
    """Feedback as numbered blocks, each with the conversation that it is about; with `scores` also
    with its task, its place among the calls, and the score."""
    return "\n".join(
        nested(
            f"FEEDBACK_{number}",
            "\n".join(
                part
                for part in (
                    block("ABOUT", _about(each)) if scores else "",
                    nested("CONVERSATION", each.context) if each.context else "",
                    block("TEXT", each.text) if each.text else "",
                )
                if part
            ),
        )
        for number, each in enumerate(feedback, 1)
        if each.text or each.context
    )


def _about(feedback: Feedback) -> str:
    call = f", call {feedback.order}" if feedback.order >= 0 else ""
    return f"task {feedback.task}{call}, score {feedback.score:g}"


def numbered_list(lines: Sequence[str]) -> str:
    """Lines `1. text`."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def temperature_of(temperatures: Sequence[float], number: int) -> float | None:
    """The temperature of a step's proposal of this number; None: the helper's own."""
    return temperatures[min(number, len(temperatures) - 1)] if temperatures else None


def falling_temperatures(count: int, highest: float = 1.3) -> tuple[float, ...]:
    """`count` temperatures that fall evenly from the highest to 0 (Trace's several candidates)."""
    steps = max(count - 1, 1)
    return tuple(round(highest * (steps - k) / steps, 10) for k in range(count))


def cast(given: Any, value: Any) -> Any:
    """What a rewriter said, as the type of the value in force; as it was said where it is no such
    thing: the param refuses it then.

    `"False"` is false for a flag, `"5"` is 5 for a number; a text stays a text whatever it holds.
    """
    if isinstance(value, str):
        return given if isinstance(given, str) else as_text(given)
    if not isinstance(given, str):
        return given
    if isinstance(value, bool):
        return {"true": True, "false": False}.get(given.strip().lower(), given)
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return given


def json_object(reply: str, key: str) -> dict[str, Any] | None:
    """The first JSON object of a reply that has this key, with whatever stands around it; None if
    there is none."""
    decoder = json.JSONDecoder(strict=False)
    start = reply.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(reply, start)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and key in found:
            return found
        start = reply.find("{", start + 1)
    return None
