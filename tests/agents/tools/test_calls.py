"""Tool calls of replies that think: what is only thought of is not run."""

from __future__ import annotations

import json
import time

import pytest

from marlora.agents.tools.calls import call_spans
from marlora.agents.tools.tools import MAX_CALLS, parse_calls
from marlora.agents.types import Turn
from marlora.rollouts.gateway.api.chat import Request, shown


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


A, B = call("a", x=1), call("b", x=2)
REPLIES = {  # a reply, and the calls that are run
    "plain": (f"Well: {A}{B}", ["a", "b"]),
    "in a thought": (f"<think>maybe {A}</think>No.", []),
    "in a thought and after it": (f"<think>maybe {A}</think>{B}", ["b"]),
    "before a thought": (f"{A}<think>then {B}</think>", ["a"]),
    "in the second thought": (f"<think>x</think>{A}<think>{B}</think>", ["a"]),
    "thought cut off": (f"<think>maybe {A}", []),
    "second thought cut off": (f"<think>x</think>{A}<think>maybe {B}", ["a"]),
    "thought opened by the prompt": (f"maybe {A}\n</think>\n\n{B}", ["b"]),
    "nested thoughts": (f"<think>one <think>{A}</think> two {A}</think>{B}", ["b"]),
    "the tag is only spoken of": (f"I could write <tool_call> here</think>{B}", ["b"]),
    "the tag is spoken of in a thought": (f"<think>a <tool_call> is</think>{B}", ["b"]),
    "a mark in an argument": (call("a", x="<think>") + B, ["a", "b"]),
    "an end in an argument": (A + call("b", x="</think>"), ["a", "b"]),
    "a call in an argument": (call("a", x=B), ["a"]),
    "upper case": (f"<THINK>{A}</THINK>{B}", ["b"]),
    "thinking": (f"<thinking>{A}</thinking>{B}", ["b"]),
    "Seed": (f"<seed:think>{A}</seed:think>{B}", ["b"]),
    "Magistral": (f"[THINK]{A}[/THINK]{B}", ["b"]),
    "Cohere": (f"<|START_THINKING|>{A}<|END_THINKING|>{B}", ["b"]),
    "Kimi": (f"◁think▷{A}◁/think▷{B}", ["b"]),
    "gpt-oss": (
        f"<|channel|>analysis<|message|>{A}<|end|><|start|>assistant<|channel|>final<|message|>{B}",
        ["b"],
    ),
    "gpt-oss, cut off": (f"<|channel|>analysis<|message|>{A}", []),
}


@pytest.mark.parametrize("kind", REPLIES)
def test_a_call_that_is_thought_of_is_none(kind: str) -> None:
    text, names = REPLIES[kind]
    assert [each["name"] for each in parse_calls(text)] == names


def test_thoughts_do_not_count_against_the_most_calls() -> None:
    text = f"<think>{A * 20}</think>{B * (MAX_CALLS + 1)}"
    *run, refused = parse_calls(text)
    assert [each["name"] for each in run] == ["b"] * MAX_CALLS and "at most" in refused["error"]


def test_a_call_that_cannot_be_read_is_an_error_for_the_model() -> None:
    for body in ("{", '{"name": "a"} and more', "", "[" * 5000):
        (wrong,) = parse_calls(f"<think>x</think><tool_call>{body}</tool_call>")
        assert "cannot be read" in wrong["error"]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 20_000,
        "<tool_call>" * 20_000 + "</think></tool_call>",
        "<tool_call>" + "<think>" * 20_000 + "</tool_call>",
        "<tool_call></tool_call>" * 10_000 + "</think>",
        "<think>" * 20_000 + "</tool_call>" * 10_000,
        "<tool_call>" + " " * 200_000,
        "<|channel|>analysis" * 10_000,
    ],
)
def test_hostile_replies_are_read_in_no_time(text: str) -> None:
    start = time.process_time()
    call_spans(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("kind", REPLIES)
def test_a_program_is_given_the_calls_outside_thoughts(kind: str) -> None:
    text, names = REPLIES[kind]
    schema = {"type": "function", "function": {"name": "a"}}
    message = shown(Turn(0, "x", (), text=text), Request("x", (), tools=(schema,)))
    assert [each["name"] for each in message.tool_calls] == names
    if not names:
        assert message.content == text
    else:
        cut = text.index(call_spans(text)[0].body) - len("<tool_call>")
        assert message.content == text[:cut].rstrip()
        if text.startswith(("<think>", "maybe")) and names == ["b"]:
            assert "</think>" in message.content
