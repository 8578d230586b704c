"""The state of a team as a value, and what a param takes."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.patterns.debate import Debate
from marlora.agents.state import (
    Kind,
    Param,
    TeamState,
    agent_params,
    check_values,
    content_key,
    outside_models,
)
from marlora.agents.types import AgentSpec, Message, PolicySpec, SettingError, from_json, to_json

STATE = TeamState(
    {"a": "a-v1", "b": "b-v7"},
    {"a.prompt": "Add.", "edges": {"a->b": {"on": 0.5, "off": 0.0}}, "a.demos": [{"role": "user"}]},
    {"judge": "http://there/v1 judge"},
)

# --- keys

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # all of Unicode, lone surrogates too
    | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same content with the names of every mapping in another order, and tuples for lists."""
    if isinstance(value, Mapping):
        names = list(value)
        rng.shuffle(names)
        return {name: shuffled(value[name], rng) for name in names}
    return tuple(shuffled(item, rng) for item in value) if isinstance(value, list) else value


@settings(max_examples=80, deadline=None)
@given(
    versions=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
    values=st.dictionaries(st.text(max_size=3), json_values, max_size=4),
    seed=st.integers(0, 9),
)
def test_equal_content_has_an_equal_key_whatever_its_order(
    versions: dict[str, str], values: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    one = TeamState(versions, values)
    other = TeamState(shuffled(versions, rng), shuffled(values, rng))
    assert one.key == other.key and len(one.key) == 16 and int(one.key, 16) >= 0
    stored = from_json(TeamState, json.loads(json.dumps(to_json(other))))
    assert stored.key == one.key and stored == one


def test_a_key_is_the_same_on_every_machine() -> None:
    # printf '{"outside": {}, "values": {"a.prompt": "Größe"}, "versions": {"a": "v1"}}' | sha256sum
    assert TeamState({"a": "v1"}, {"a.prompt": "Größe"}).key == "1f6540922a312fa3"


def test_other_content_has_another_key() -> None:
    others = [
        STATE,
        TeamState(),
        STATE.with_versions({"a": "a-v1"}),
        STATE.with_versions({"a": "b-v7", "b": "a-v1"}),
        STATE.with_values({"a.prompt": "add."}),
        STATE.with_values({"a.prompt ": "Add."}),
        STATE.with_values({"edges": {"a->b": {"on": 0.0, "off": 0.5}}}),
        STATE.with_values({"a.demos": []}),
        dataclasses.replace(STATE, outside={}),
        dataclasses.replace(STATE, outside={"judge": "http://elsewhere/v1 judge"}),
        dataclasses.replace(STATE, outside={"judge": "http://there/v1 other"}),
        # what is a version of one is a value of the other
        TeamState({"x": "y"}),
        TeamState({}, {"x": "y"}),
        TeamState({}, {}, {"x": "y"}),
    ]
    assert len({each.key for each in others}) == len(others)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1, 2}, object(), b"x"],
    ids=["nan", "inf", "set", "object", "bytes"],
)
def test_what_json_does_not_hold_has_no_key(value: Any) -> None:
    with pytest.raises(SettingError, match=r"values: expected texts, numbers, lists and mappings"):
        _ = TeamState({}, {"edges": {"x": value}}).key
    with pytest.raises(SettingError, match=r"here: expected texts"):
        content_key([value], "here")


def test_states_are_changed_into_new_ones() -> None:
    changed = STATE.with_values({"a.prompt": "Sum.", "new": 1})
    assert changed.values == {**STATE.values, "a.prompt": "Sum.", "new": 1}
    assert (changed.versions, changed.outside) == (STATE.versions, STATE.outside)
    assert STATE.values["a.prompt"] == "Add." and "new" not in STATE.values
    assert STATE.with_versions({"a": "a-v2"}).versions == {"a": "a-v2"}
    assert STATE.with_versions(STATE.versions) == STATE


def test_a_state_of_some_policies_has_their_versions_in_their_order() -> None:
    assert STATE.of(["a", "b"]) is STATE
    assert list(STATE.of(["b", "base", "a"]).versions) == ["b", "a"]
    assert STATE.of(["b", "a"]).key == STATE.key
    assert STATE.of(["b"]) == STATE.with_versions({"b": "b-v7"})
    assert STATE.of([]).values == STATE.values


def test_outside_models_are_told_by_address_and_model() -> None:
    policies = {
        "a": PolicySpec("a"),
        "judge": PolicySpec("judge", url="http://there/v1", base="gpt"),
        "own": PolicySpec("own", url="http://here/v1"),
    }
    expected = {"judge": "http://there/v1 gpt", "own": "http://here/v1 own"}
    assert outside_models(policies) == expected


# --- params

DEMOS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
TAKEN: list[tuple[Kind, Any]] = [
    ("text", ""),
    ("text", "Think."),
    ("program", "async def run(): ..."),
    ("number", 0),
    ("number", -2.5),
    ("number", 10**400),
    ("choice", "x"),
    ("flag", False),
    ("demos", []),
    ("demos", DEMOS),
    ("demos", (Message("user", "1+1?"), Message("assistant", "2"))),
    ("logits", {}),
    ("logits", {"x": 1, "y": -0.5}),
    ("logits", {"x": {"on": 1.0}, "y": {}}),
]
REFUSED: list[tuple[Kind, Any, str]] = [
    ("text", None, "expected a text, got None"),
    ("text", ["Think."], r"expected a text, got \['Think\.'\]"),
    ("program", 3, "expected a text, got 3"),
    ("number", "3", "expected a number, got '3'"),
    ("number", True, "expected a number, got True"),
    ("number", math.nan, "expected a number, got nan"),
    ("number", math.inf, "expected a number, got inf"),
    ("flag", "False", "expected true or false, got 'False'"),
    ("flag", 1, "expected true or false, got 1"),
    ("choice", 1, "expected a name, got 1"),
    ("choice", "z", "expected one of x, y, got 'z'"),
    ("demos", "1+1?", r"expected a list of messages, got '1\+1\?'"),
    ("demos", ["1+1?"], r"p: expected a mapping of the fields of Message"),
    ("demos", [{"role": "user"}], r"p\.content: missing; Message needs it"),
    ("demos", [{"role": "boss", "content": ""}], r"p\.role: expected one of"),
    ("demos", [{"role": "user", "text": ""}], r"p\.text: unknown field"),
    ("logits", [0.5], r"expected logits by option, got \[0\.5\]"),
    ("logits", {"x": "1"}, "x: expected a number, got '1'"),
    ("logits", {"x": {"on": math.inf}}, "x: on: expected a number, got inf"),
    ("logits", {"z": 1.0}, "no logits of 'z'; known: 'x', 'y'"),
]


def param(kind: Kind, **fields: Any) -> Param:
    return Param("p", None, kind, options=("x", "y"), **fields)


@pytest.mark.parametrize(("kind", "value"), TAKEN, ids=repr)
def test_values_of_its_kind_are_taken(kind: Kind, value: Any) -> None:
    assert param(kind).problem(value) is None


@pytest.mark.parametrize(("kind", "value", "told"), REFUSED, ids=repr)
def test_other_values_are_refused(kind: Kind, value: Any, told: str) -> None:
    problem = param(kind).problem(value)
    assert problem is not None and re.match(told, problem), problem


def test_names_are_free_where_there_are_no_options() -> None:
    assert Param("p", "x", "choice").problem("anything") is None
    assert Param("p", {}, "logits").problem({"anything": 1.0}) is None


def test_legal_says_why_and_is_asked_only_about_the_right_kind() -> None:
    asked = []

    def short(value: Any) -> str | None:
        asked.append(value)
        return f"{len(value)} words, at most 2" if len(value) > 2 else None

    one = param("text", legal=short)
    assert one.problem("abc") == "3 words, at most 2"
    assert one.problem("ab") is None
    assert one.problem(5) == "expected a text, got 5"
    assert asked == ["abc", "ab"]


def test_long_values_are_cut_in_messages() -> None:
    told = param("number").problem("x" * 1000)
    assert told is not None and len(told) < 100


def test_every_agent_has_a_prompt_demonstrations_and_a_policy() -> None:
    agents = (
        AgentSpec("a", "adds", "Add.", demos=(Message("user", "1"), Message("assistant", "1"))),
        AgentSpec("b", policy="shared"),
    )
    found = {each.name: each for each in agent_params(agents)}
    assert list(found) == [f"{a}.{what}" for a in "ab" for what in ("prompt", "demos", "policy")]
    assert (found["a.prompt"].value, found["a.prompt"].kind) == ("Add.", "text")
    assert (found["a.policy"].value, found["b.policy"].value) == ("a", "shared")
    assert found["b.policy"].kind == "choice" and found["a.demos"].kind == "demos"
    assert (found["a.prompt"].agent, found["a.prompt"].role) == ("a", "adds")
    for each in found.values():  # a value that stands is one that may be set, through JSON too
        assert each.problem(each.value) is None
        assert each.problem(json.loads(json.dumps(each.value))) is None
    assert Debate(agents).params() == agent_params(agents)


def test_values_are_checked_by_name_and_kind() -> None:
    params = agent_params([AgentSpec("solver")])
    check_values(params, {})
    check_values(params, {"solver.prompt": "Think.", "solver.demos": DEMOS})
    for values, told in (
        ({"solvr.prompt": "x"}, r"values\.solvr\.prompt: no such param; did you mean 'solver\.pro"),
        ({"zzz": 1}, r"values\.zzz: no such param; known: 'solver\.prompt', 'solver\.demos'"),
        ({"solver.prompt": 5}, r"values\.solver\.prompt: expected a text, got 5"),
        ({"solver.policy": ["x"]}, r"values\.solver\.policy: expected a name, got \['x'\]"),
    ):
        with pytest.raises(SettingError, match=told):
            check_values(params, values)
    with pytest.raises(SettingError, match=r"init\.solver\.prompt: expected a text"):
        check_values(params, {"solver.prompt": 5}, "init")
    refuses = Param("solver.prompt", "", "text", legal=lambda value: "not today")
    with pytest.raises(SettingError, match=r"values\.solver\.prompt: not today"):
        check_values([refuses], {"solver.prompt": "x"})
