"""Types go to JSON and back without loss, and refuse what they do not know."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlora.agents.types import (
    AdapterSpec,
    AgentSpec,
    Completion,
    Decision,
    Message,
    PolicySpec,
    Sampling,
    SettingError,
    Task,
    Turn,
    Usage,
    from_json,
    nearest,
    to_json,
)
from marlora.rollouts.types import Episode

COMPLETION = Completion("4", (1, 2), (3,), (-0.25,), "length", "solver", "solver-v1-3fa9")
EXAMPLES = [
    Task(
        "t",
        "2+2?",
        answer=["4", 4.0],
        source="arithmetic",
        split="eval",
        meta={"c": 5, "_tests": ["x"]},
    ),
    Message(
        "tool",
        "4",
        name="calculator",
        tool_calls=({"id": "1", "function": {"name": "f"}},),
        tool_call_id="1",
    ),
    Sampling(0.7, 0.9, 40, 0.05, 1.1, 0.2, 0.3, 32, ("\n", "END"), 2**61 + 1),
    Sampling(seed=None),
    AdapterSpec(8, 16.5, ("q_proj",), 0.1),
    PolicySpec("solver", "some/model", AdapterSpec(4), False, "runs/a#solver", 1e-5, None),
    AgentSpec(
        "solver",
        "solves",
        "You solve.",
        "shared",
        Sampling(0.0),
        ("calculator",),
        (Message("user", "hi"),),
    ),
    COMPLETION,
    Turn(
        3,
        "solver",
        (Message("user", "2+2?"), Message("assistant", "5")),
        (0, 2),
        1,
        False,
        "written",
        True,
        Sampling(seed=7),
        **dataclasses.asdict(COMPLETION),
    ),
    Decision(0, "edge", ("a", "b"), "b", -0.693, "v1"),
]


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_round_trip(value: Any) -> None:
    again = from_json(type(value), json.loads(json.dumps(to_json(value))))
    assert again == value
    # Equal is not enough: a list where a tuple belongs would compare unequal later, in a replay.
    assert [type(getattr(again, f.name)) for f in dataclasses.fields(value)] == [
        type(getattr(value, f.name)) for f in dataclasses.fields(value)
    ]


@pytest.mark.parametrize("value", EXAMPLES, ids=lambda value: type(value).__name__)
def test_unknown_and_missing_fields_are_named(value: Any) -> None:
    data = to_json(value)
    first = next(iter(data))
    with pytest.raises(
        SettingError,
        match=rf"{type(value).__name__}.{first}x: unknown field; did you mean '{first}'\?",
    ):
        from_json(type(value), {**data, f"{first}x": 1})
    for f in dataclasses.fields(value):
        rest = {key: item for key, item in data.items() if key != f.name}
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            with pytest.raises(SettingError, match=f"{type(value).__name__}.{f.name}: missing"):
                from_json(type(value), rest)
        else:
            from_json(type(value), rest)


@pytest.mark.parametrize(
    ("cls", "data", "problem"),
    [
        (
            AgentSpec,
            {"name": "a", "sampling": {"temprature": 1}},
            r"AgentSpec.sampling.temprature: .* 'temperature'",
        ),
        (
            AgentSpec,
            {
                "name": "a",
                "demos": [{"role": "user", "content": "x"}, {"role": "boss", "content": ""}],
            },
            r"demos\[1\].role",
        ),
        (AgentSpec, {"name": "a", "tools": "calculator"}, "AgentSpec.tools: expected a list"),
        (AgentSpec, {"name": 3}, "AgentSpec.name: expected str, got 3"),
        (AgentSpec, {"name": "a/b"}, "letters, digits"),
        (AgentSpec, {"name": ""}, "letters, digits"),
        (AgentSpec, ["a"], "expected a mapping"),
        (PolicySpec, {"name": "a", "adapter": {"r": 0}}, "r >= 1"),
        (
            PolicySpec,
            {"name": "a", "adapter": {"r": True}},
            "PolicySpec.adapter.r: expected int, got True",
        ),
        (PolicySpec, {"name": "a", "learning_rate": "fast"}, "learning_rate: expected float"),
        (Sampling, {"temperature": -1}, "temperature >= 0"),
        (Sampling, {"max_tokens": 0}, "max_tokens >= 1"),
        (Sampling, {"top_p": 0}, "top_p"),
        (Task, {"id": "t", "prompt": "x", "meta": [1]}, "Task.meta: expected a mapping"),
    ],
)
def test_wrong_values_are_named_by_path(cls: type, data: Any, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        from_json(cls, data)


def test_whole_numbers_are_floats_where_floats_belong() -> None:
    assert repr(from_json(Sampling, {"temperature": 1}).temperature) == "1.0"


def test_mappings_of_dataclasses_are_built() -> None:
    episode = Episode(
        "e",
        "g",
        EXAMPLES[0],
        turns=(EXAMPLES[8],),
        decisions=(EXAMPLES[9],),
        usage={"solver": Usage(1, 2, 3, 0.5)},
    )
    assert from_json(Episode, json.loads(json.dumps(to_json(episode)))) == episode
    with pytest.raises(SettingError, match=r"Episode\.usage\.solver\.call: unknown field"):
        from_json(Episode, {**to_json(episode), "usage": {"solver": {"call": 1}}})


def test_public_drops_answer_and_private_meta_only() -> None:
    task = EXAMPLES[0]
    public = task.public()
    assert public == Task("t", "2+2?", source="arithmetic", split="eval", meta={"c": 5})
    assert task.answer == ["4", 4.0] and "_tests" in task.meta and public.public() == public


def test_on_policy_means_the_whole_softmax() -> None:
    assert (
        Sampling().on_policy
        and Sampling(temperature=0.7, max_tokens=9, stop=("x",), seed=1).on_policy
    )
    for change in (
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ):
        assert not Sampling(**change).on_policy


def test_policies_are_named_after_their_agent_unless_told() -> None:
    assert AgentSpec("a").policy == "a" and AgentSpec("a", policy="shared").policy == "shared"
    assert PolicySpec("a").has_adapter
    assert not PolicySpec("base").has_adapter and not PolicySpec("a", url="http://x/v1").has_adapter


def test_nearest() -> None:
    assert nearest("solvr", ["solver", "critic"]) == "did you mean 'solver'?"
    assert nearest("zzz", ["solver", "critic"]) == "known: 'solver', 'critic'"
    assert nearest("zzz", []) == "known: none"


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    messages=st.lists(
        st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts),
        max_size=4,
    ).map(tuple),
    ids=st.lists(st.integers(0, 2**20), max_size=5).map(tuple),
    logprobs=st.lists(
        st.floats(max_value=0, allow_nan=False, allow_infinity=False), max_size=5
    ).map(tuple),
    text=texts,
)
def test_any_turn_survives_json(messages: Any, ids: Any, logprobs: Any, text: str) -> None:
    turn = Turn(0, "a", messages, text=text, prompt_ids=ids, token_ids=ids, logprobs=logprobs)
    assert from_json(Turn, json.loads(json.dumps(to_json(turn)))) == turn
