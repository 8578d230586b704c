"""Edits of a structure: a rewriter that asks for operations on a pipeline instead of for a new one,
checks that they are legal, and makes all of a reply's or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...agents.patterns.pipeline_edits import (
    ON_PIPELINE,
    ON_STATE,
    IllegalEdit,
    operations_in_words,
    with_operations,
    with_parts,
)
from ...agents.text.tags import block, inside
from .backward import ByParam, Feedback
from .helpers import REFUSED, UNREADABLE, Helpers, Question
from .rewriters import Proposal, feedback_blocks
from .targets import Target, as_text

PROMPT, NODE, PIPELINE = "prompt", "node", "pipeline"  # kinds of edits
Value = Mapping[str, Any]


@dataclass(frozen=True)
class _Edit:
    """What is asked for one reply.

    Args:
        about: names it. prompt: of the method, with these `fields`.
        feedback: what it is made from.
        make: the value after the edits that a reply names; raises `IllegalEdit`.
    """

    about: str
    prompt: str
    fields: Mapping[str, str]
    feedback: Sequence[Feedback]
    make: Callable[[Value, Any], Value]


@dataclass
class StructureEdits:
    """Edits of the one param, a pipeline (`agents/patterns/pipeline.py`), of the kinds of this step
    in turn (agent symbolic learning, arXiv:2406.18532): `prompt`, a call per role that something
    was said of, from the last to the first; `node`, a call per state; `pipeline`, one call.

    A reply has JSON between `<RESULT>` and its closing tag: changed parts by name, or a list of
    operations. What cannot be made, or does not leave a pipeline, changes nothing: it is asked for
    again with what is wrong, `retries` times, then dropped and counted.

    Args:
        agent: who speaks roles that are added without naming an agent.
        kinds: of the step; the method sets them before each.

    Prompts: `rewrite_system`; `edit_prompt` with `{place}`, `{role}`, `{feedback}` and `{fault}`;
    `edit_node` with `{place}`, `{state}`, `{operations}`, `{feedback}` and `{fault}`;
    `edit_pipeline` with `{pipeline}`, `{operations}`, `{agents}`, `{feedback}` and `{fault}`.
    """

    agents: Sequence[str]
    helper: str = "optimizer"
    retries: int = 3
    kinds: Sequence[str] = field(default_factory=lambda: (PROMPT,))

    def propose(
        self,
        helpers: Helpers,
        targets: Sequence[Target],
        feedback: ByParam,
        history: Callable[[str], str],
        number: int,
    ) -> Proposal:
        (target,) = targets
        given, value, made = feedback[target.name], target.value, 0
        assert isinstance(value, Mapping)
        if not given:
            return Proposal()
        for kind in self.kinds:
            edits = {PROMPT: self._of_roles, NODE: self._of_states, PIPELINE: self._of_whole}
            value, count = self._edited(helpers, target, value, edits[kind](value, given), number)
            made += count
        return Proposal({target.name: value}, ", ".join(self.kinds)) if made else Proposal()

    # what is asked

    def _of_roles(self, value: Value, given: Sequence[Feedback]) -> list[_Edit]:
        by_place: dict[str, list[Feedback]] = {}
        for each in sorted(given, key=lambda f: -f.order):
            state, _, role = each.place.partition("/")
            if role in value["states"].get(state, {}).get("roles", {}):
                by_place.setdefault(each.place, []).append(each)
        edits = []
        for place, own in by_place.items():
            state, _, name = place.partition("/")
            role = value["states"][state]["roles"][name]
            shown = as_text({"template": role["template"], **role["parts"]})
            fields = {"place": place, "role": block("ROLE", shown)}
            edits.append(_Edit(place, "edit_prompt", fields, own, _with_parts_at(place)))
        return edits

    def _of_states(self, value: Value, given: Sequence[Feedback]) -> list[_Edit]:
        by_state: dict[str, list[Feedback]] = {}
        for each in sorted(given, key=lambda f: -f.order):
            state = each.place.partition("/")[0]
            if state in value["states"]:
                by_state.setdefault(state, []).append(each)
        return [
            _Edit(
                state,
                "edit_node",
                {
                    "place": state,
                    "state": block("STATE", as_text(value["states"][state])),
                    "operations": operations_in_words(ON_STATE),
                },
                own,
                self._with_operations_on(state),
            )
            for state, own in by_state.items()
        ]

    def _of_whole(self, value: Value, given: Sequence[Feedback]) -> list[_Edit]:
        fields = {
            "pipeline": block("PIPELINE", as_text(value)),
            "operations": operations_in_words(ON_PIPELINE),
            "agents": ", ".join(self.agents),
        }
        make = self._with_operations_on("")
        return [_Edit("pipeline", "edit_pipeline", fields, given, make)]

    def _with_operations_on(self, state: str) -> Callable[[Value, Any], Value]:
        def make(value: Value, operations: Any) -> Value:
            return with_operations(value, operations, agent=self.agents[0], state=state)

        return make

    # asking, checking, asking again

    def _edited(
        self, helpers: Helpers, target: Target, value: Value, edits: Sequence[_Edit], number: int
    ) -> tuple[Value, int]:
        """The value after the edits that could be made, and how many replies these were."""
        made, left = 0, [(edit, "") for edit in edits]
        for attempt in range(self.retries + 1):
            name = f"{number}" if not attempt else f"{number}.{attempt}"
            replies = helpers.ask([self._question(helpers, *each, name) for each in left])
            asked, left = left, []
            for (edit, _), reply in zip(asked, replies, strict=True):
                if reply is None:
                    continue
                try:
                    value = _legal(target, edit.make(value, _result(reply)))
                    made += 1
                except IllegalEdit as error:
                    left.append((edit, str(error)))
        for _, fault in left:
            helpers.counts[UNREADABLE if fault == NO_RESULT else REFUSED] += 1
        return value, made

    def _question(self, helpers: Helpers, edit: _Edit, fault: str, number: str) -> Question:
        again = f"Your last reply changed nothing: {fault}. Try again." if fault else ""
        text = helpers.prompt(
            edit.prompt, **edit.fields, feedback=feedback_blocks(edit.feedback), fault=again
        )
        gold = any(each.saw_gold for each in edit.feedback)
        about = f"{self.helper}/{edit.about}/{number}"
        return Question(self.helper, helpers.prompt("rewrite_system"), text, about, saw_gold=gold)


NO_RESULT = "there is no JSON between <RESULT> and its closing tag"


def _result(reply: str) -> Any:
    text = inside(reply, "RESULT")
    try:
        return json.loads(text or "", strict=False)
    except (ValueError, RecursionError) as error:  # nested too deep
        raise IllegalEdit(NO_RESULT) from error


def _legal(target: Target, value: Value) -> Value:
    if problem := target.param.problem(value):
        raise IllegalEdit(problem)
    return value


def _with_parts_at(place: str) -> Callable[[Value, Any], Value]:
    return lambda value, changes: with_parts(value, place, changes)
