"""Pipelines: who speaks when, what is a pipeline at all, and what edits make of one."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import pytest

from marlora.agents.patterns.pipeline import PIPELINE, Pipeline, chained, role_of
from marlora.agents.patterns.pipeline_edits import (
    ON_PIPELINE,
    ON_STATE,
    IllegalEdit,
    operations_in_words,
    with_operations,
    with_parts,
)
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task, Turn
from tests.conformance import check_system

TASK = Task("t", "Write a poem.", "x")
Answer = Callable[[str, tuple[Message, ...]], str]


def state(*roles: str, agent: str = "a", route: str = "order", to: Any = ()) -> dict[str, Any]:
    return {
        "about": f"work of {roles[0]}",
        "roles": {name: role_of(agent, f"You are {name}.", "Be brief.") for name in roles},
        "route": route,
        "first": roles[0],
        "next": list(to),
    }


def looped(**changes: Any) -> dict[str, Any]:
    """`write` (writer, then editor), then `check`, which leads back or to the end."""
    states = {
        "write": state("writer", "editor", to=["check"]),
        "check": state("checker", agent="b", to=["write", "end"]),
    }
    return {"begin": "write", "states": states, **changes}


def play(
    value: dict[str, Any], answer: Answer, seed: int = 0, **settings: Any
) -> tuple[Turn, Team]:
    system = Pipeline(["a", "b"], **settings)
    team = fake_team(system.specs, answer, {PIPELINE: value}, seed=seed)
    return asyncio.run(system.run(TASK.public(), team)), team


def places(team: Team) -> list[str]:
    return [operation.text for operation in team.operations if operation.name == PIPELINE]


@pytest.mark.parametrize(
    "pipeline",
    [
        {},
        looped(),
        {"begin": "w", "states": {"w": state("x", "y", "z", route="random")}},
        {"begin": "w", "states": {"w": state("x", "y", "z", route="model")}},
    ],
)
def test_conformance(pipeline: dict[str, Any]) -> None:
    """Also with answers that name what comes next, and with answers that name nothing."""
    system = Pipeline(["a", "b"], pipeline=pipeline, max_states=4)
    check_system(system, [TASK])
    check_system(system, [TASK], lambda agent, messages, marker: f"{marker} z end")


def test_without_a_pipeline_it_is_a_chain() -> None:
    output, team = play(chained(["a", "b"]), lambda agent, messages: f"by {agent}")
    assert output.text == "by b" and places(team) == ["a/a", "b/b"]
    first, second = team.turns
    assert first.messages[-1].content == "[a/a]\nWrite a poem."
    assert second.messages[-1].content == "[b/b]\nWrite a poem.\n\nby a"
    assert second.reads == (1, 2), "what it was shown, and its place"


def test_roles_of_a_state_speak_in_turn_and_a_model_chooses_the_next_state() -> None:
    replies = iter(["draft", "better", "bad", "go to write", "draft 2", "good", "fine", "end"])
    output, team = play(looped(), lambda agent, messages: next(replies))
    assert output.text == "fine"
    assert places(team) == ["write/writer", "write/editor", "check/checker"] * 2
    assert [t.agent for t in team.turns] == ["a", "a", "b", "b", "a", "a", "b", "b"]
    asked = team.turns[3].messages[-1].content
    assert "write: work of writer" in asked and "\nend: " in asked and "bad" in asked
    again = next(o for o in team.operations if o.text == "write/writer" and o.reads)
    choice = next(o for o in team.operations if o.index == again.reads[0])
    assert choice.name == "choice" and choice.reads == (team.turns[3].index,)


def test_a_role_begins_and_an_unreadable_choice_is_on_record() -> None:
    value = looped()
    value["states"]["write"]["first"] = "editor"
    _, team = play(value, lambda agent, messages: "hm", max_states=3)
    assert places(team)[:2] == ["write/editor", "write/writer"]
    faults = [o.error for o in team.operations if o.name == "choice"]
    assert faults == ["none of write, end was named"]
    limit = team.operations[-1]
    assert limit.name == "limit" and "more than 3 states" in limit.error, "loops are cut off"


@pytest.mark.parametrize("route", ["random", "model"])
def test_routes(route: str) -> None:
    value = {"begin": "w", "states": {"w": state("x", "y", "z", route=route)}}
    orders = set()
    for seed in range(8):
        replies = iter(["1", "z", "2", "end"])
        _, team = play(value, lambda agent, messages: next(replies), seed=seed)  # noqa: B023
        orders.add(tuple(places(team)))
    if route == "model":
        assert orders == {("w/x", "w/z")}
    else:
        assert len(orders) > 2 and all(len(order) == 3 for order in orders)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.pop("begin"), "pipeline: expected a mapping with begin, states"),
        (lambda v: v.update(begin="nowhere"), "begin: no state 'nowhere'"),
        (lambda v: v.update(begin=["write"]), "begin: no state ['write']"),
        (lambda v: v["states"]["check"].update(next=[{"state": "write"}]), "next: no state {"),
        (lambda v: v["states"]["check"].update(next=[["write"]]), "next: no state ["),
        (lambda v: v["states"]["write"].update(first=["editor"]), "first: no role ["),
        (lambda v: v["states"]["write"].update(route=["order"]), "route: expected one of"),
        (lambda v: v["states"].update(more=state("x")), "states.more: no way leads to it"),
        (lambda v: v["states"]["check"].update(next=["write"]), "no way leads from it to an end"),
        (lambda v: v["states"]["check"].update(next=["nowhere"]), "next: no state 'nowhere'"),
        (lambda v: v["states"]["write"].update(first="nobody"), "first: no role 'nobody'"),
        (lambda v: v["states"]["write"].update(route="vote"), "route: expected one of"),
        (lambda v: v["states"]["write"].update(roles={}), "roles: expected from 1 to 20"),
        (lambda v: v["states"]["write"].pop("about"), "states.write: expected a mapping with"),
        (lambda v: v["states"].update({"end": state("x")}), "states.end: 'end' ends the run"),
        (
            lambda v: v["states"]["check"]["roles"]["checker"].update(agent="c"),
            "roles.checker.agent: no agent 'c'",
        ),
        (
            lambda v: v["states"]["check"]["roles"]["checker"].update(template="{nothing}"),
            "unknown field {nothing}",
        ),
        (lambda v: v["states"]["check"]["roles"]["checker"].update(template="{"), "unpaired '{'"),
        (
            lambda v: v["states"]["check"]["roles"]["checker"].update(parts={"prompt": "x"}),
            "'prompt' cannot name a part",
        ),
        (lambda v: v["states"].update({"a/b": state("x")}), "'a/b' is no name"),
    ],
)
def test_what_is_no_pipeline(change: Callable[[dict[str, Any]], Any], problem: str) -> None:
    value = looped()
    change(value)
    system = Pipeline(["a", "b"])
    param = next(p for p in system.params() if p.name == PIPELINE)
    assert problem in (param.problem(value) or ""), param.problem(value)
    assert param.problem(looped()) is None
    with pytest.raises(SettingError, match="pipeline: "):
        Pipeline(["a", "b"], pipeline=value)
    with pytest.raises(SettingError, match=r"values\.pipeline: "):
        play(value, lambda agent, messages: "x")


# edits


def test_parts_of_a_prompt() -> None:
    """Fact U6: another key or a template without one of its fields is refused; an empty mapping
    changes nothing; and whatever happens the old pipeline is as it was."""
    value, before = looped(), copy.deepcopy(looped())
    assert with_parts(value, "write/writer", {}) == before
    changed = with_parts(
        value,
        "write/writer",
        {"instruction": "Be long.", "template": "{prompt} {about}{instruction}{previous}"},
    )
    role = changed["states"]["write"]["roles"]["writer"]
    assert role["parts"] == {"instruction": "Be long."} and role["template"].startswith("{prompt}")
    for changes, why in [
        ({"style": "x"}, "no part 'style'"),
        ({"template": "{about}\n{instruction}\n{prompt}"}, "it lacks {previous}"),
        (
            {"template": "{about}{instruction}{prompt}{previous}{history}"},
            "unknown field {history}",
        ),
        ({"template": "{"}, "unpaired"),
        ({"instruction": 3}, "expected a text"),
        (["instruction"], "expected a mapping"),
    ]:
        with pytest.raises(IllegalEdit, match=why):
            with_parts(value, "write/writer", changes)
    with pytest.raises(IllegalEdit, match="there is no such role"):
        with_parts(value, "write/nobody", {})
    assert value == before


def test_operations_on_a_state() -> None:
    """A role that was added can be deleted again: upstream that raises, and the update is lost."""
    value = looped()
    changed = with_operations(
        value,
        [
            {"op": "add_role", "role": "poet", "about": "You rhyme.", "instruction": "Rhyme."},
            {"op": "update_role_description", "role": "editor", "about": "You cut."},
            {"op": "update_controller", "route": "random", "first": "poet"},
            {"op": "update_node_description", "about": "poems"},
            {"op": "delete_role", "role": "writer"},
        ],
        agent="b",
        state="write",
    )
    own = changed["states"]["write"]
    assert list(own["roles"]) == ["editor", "poet"] and own["first"] == "poet"
    assert own["roles"]["poet"] == role_of("b", "You rhyme.", "Rhyme.")
    assert (own["route"], own["about"], own["roles"]["editor"]["about"]) == (
        "random",
        "poems",
        "You cut.",
    )
    back = with_operations(
        changed, [{"op": "delete_role", "role": "poet"}], agent="b", state="write"
    )
    assert back["states"]["write"]["first"] == "editor" and value == looped()


def test_operations_on_the_whole() -> None:
    value = looped()
    changed = with_operations(
        value,
        [
            {"op": "add_node", "state": "polish", "about": "You polish.", "next": ["end"]},
            {"op": "update_edges", "state": "write", "next": ["polish"]},
            {"op": "delete_node", "state": "check"},
            {"op": "update_node_description", "state": "polish", "about": "last touches"},
        ],
        agent="a",
    )
    assert list(changed["states"]) == ["write", "polish"]
    assert changed["states"]["polish"]["roles"]["polish"]["about"] == "You polish."
    assert Pipeline(["a", "b"]).problem(changed) is None and value == looped()
    cut = with_operations(value, [{"op": "delete_node", "state": "check"}], agent="a")
    assert cut["states"]["write"]["next"] == []


@pytest.mark.parametrize(
    ("state_", "operations", "why"),
    [
        ("write", {"op": "add_role"}, "expected a list of operations"),
        ("write", ["add_role"], "operation 1: expected a mapping with op"),
        ("write", [{"op": "add_node", "state": "x"}], "operation 1: no 'add_node'"),
        ("write", [{"op": "add_role", "role": "x"}], r"operation 1 \(add_role\): about is missing"),
        ("write", [{"op": "delete_role", "role": "editor", "why": "x"}], "unknown key 'why'"),
        ("write", [{"op": "delete_role", "role": "nobody"}], "no role 'nobody'"),
        ("write", [{"op": "add_role", "role": "editor", "about": ""}], "a name that is not taken"),
        ("", [{"op": "update_edges", "state": "nowhere", "next": []}], "no state 'nowhere'"),
        ("", [{"op": "delete_node", "state": ["write"]}], "no state"),
        ("", [{"op": "update_edges", "state": "write", "next": None}], "a list of names"),
        ("", [{"op": "update_edges", "state": "write", "next": [["check"]]}], "a list of names"),
        ("", [{"op": "add_node", "state": "x", "about": "", "next": {}}], "a list of names"),
        ("", [{"op": "add_node", "state": "check", "about": "", "next": []}], "is not taken"),
    ],
)
def test_operations_that_cannot_be_made(state_: str, operations: Any, why: str) -> None:
    """One that cannot be made undoes those before it."""
    value = looped()
    first = {
        "op": "update_node_description",
        "about": "new",
        **({} if state_ else {"state": "write"}),
    }
    with pytest.raises(IllegalEdit, match=why.replace("operation 1", "operation .")):
        given = [first, *operations] if isinstance(operations, list) else operations
        with_operations(value, given, agent="a", state=state_)
    assert value == looped()


def test_operations_in_words() -> None:
    assert "add_role: role, about, instruction (optional), agent (optional)" in operations_in_words(
        ON_STATE
    )
    assert "update_edges: state, next" in operations_in_words(ON_PIPELINE)
