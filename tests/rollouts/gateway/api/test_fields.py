"""Every field of every body by every JSON type: an answer or a 400 that names the field, and
nothing else has changed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeLimits
from marlora.rollouts.gateway.api.fields import MAX_DEPTH, MAX_ITEMS, loaded
from marlora.rollouts.gateway.session import Session
from tests.rollouts.asking import Asker, chat, numbered, played

TOKEN = "a-reward-token-of-24-chars"
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}}
FUNCTION = {"name": "calc", "description": "adds", "parameters": SCHEMA, "strict": True}
SETTINGS = {
    "seed": 7,
    "user": "u",
    "metadata": {"k": "v"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "p",
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "verbosity": "low",
    "prompt_cache_retention": "24h",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
}
CALLED = {"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"x": 1}'}}
CHAT = {
    "model": "a",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "add"}], "name": "me"},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "no"}],
            "tool_calls": [CALLED],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "15"},
        {"role": "user", "content": "and?"},
    ],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["zz"],
    "max_tokens": 9,
    "max_completion_tokens": 8,
    "logprobs": True,
    "top_logprobs": 0,
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "auto",
    "logit_bias": {"15": -1.5},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    **SETTINGS,
}
FORCED = {
    **chat("a", "hi"),
    "tool_choice": {"type": "function", "function": {"name": "calc"}},
    "tools": CHAT["tools"],
}
HELD = {**chat("a", "hi"), "structured_outputs": {"choice": ["yes", "no"]}}
RESPONSE = {
    "model": "a",
    "instructions": "Be brief.",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "reasoning", "summary": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "so"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "calc", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "15"},
        {"role": "user", "content": "and?"},
    ],
    "tools": [{"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "name": "calc"},
    "max_output_tokens": 9,
    "text": {
        "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True},
        "verbosity": "low",
    },
    "stream": False,
    "stream_options": {},
    "include": ["reasoning.encrypted_content"],
    "truncation": "auto",
    "reasoning": {"effort": "low"},
    **SETTINGS,
}
REWARDS = [{"value": 1, "name": "r", "text": "t", "agent": "a", "turn": 0, "sibling": 1}, 0.5]
BODIES = {
    "chat": CHAT,
    "forced": FORCED,
    "held": HELD,
    "response": RESPONSE,
    "rewards": REWARDS,
    "reward": REWARDS[0],
}

DEEP = b"[" * 100_000 + b"]" * 100_000
WELL_FORMED = [
    b"null",
    b"true",
    b"0",
    b"-1",
    b"1.5",
    b'""',
    b'"x"',
    b"[]",
    b"[1]",
    b"[[]]",
    b"[null]",
    b'["x", {}]',
    b"{}",
    b'{"a":1}',
    b"9" * 30,
    b"1e30",
]
NEVER_RIGHT = [
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"9" * 5000,
    b'"\\ud800"',
    b'{"\\udfff": 1}',
    DEEP,
    b'{"a":' * 200 + b"1" + b"}" * 200,
]
MARK = "@here@"
Path = tuple[str | int, ...]


def nodes(value: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, each in inner:
        yield from nodes(each, (*path, key))


def changed(body: Any, path: Path, raw: bytes | None) -> bytes:
    """The body with the node at `path` replaced by this JSON text, or without it."""
    made = json.loads(json.dumps(body))
    at = made
    for key in path[:-1]:
        at = at[key]
    if raw is None:
        del at[path[-1]]
    else:
        at[path[-1]] = MARK
    return json.dumps(made).encode().replace(f'"{MARK}"'.encode(), raw or b"")


def named(path: Path, start: str = "") -> str:
    said = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return (start + said).removeprefix(".")


def names(param: str | None, path: Path, start: str) -> bool:
    """A field, what it stands in, or, as fields of one object go together, one beside it."""
    if param is None or (param == "the body" and not isinstance(path[0], int)):
        return False
    if param == "the body":  # which is a list
        return True
    spelt = [(named(path, begin), named(path[:-1], begin)) for begin in {start, ""}]
    return any(
        where.startswith(param) or param.startswith(beside or where) for where, beside in spelt
    )


def state(visit: Session) -> tuple[Any, ...]:
    """All that a request can change in an episode."""
    team = visit.team
    return (
        [(t.index, t.sibling, t.taken) for t in team.turns],
        team.reserve(0),
        list(team.rewards),
        len(visit.calls),
        set(visit._continued),
        visit.chats.sizes(),
        visit.posted.is_set(),
        visit._fatal.done(),
        visit.too_long,
    )


async def post(asker: Asker, kind: str, raw: bytes) -> tuple[int, Any]:
    if kind.startswith("reward"):
        return await asker.post(
            asker.visit.base_url.removesuffix("/v1") + "/rewards", raw, key=TOKEN
        )
    return await asker.post("/responses" if kind == "response" else "/chat/completions", raw)


async def refused_or_answered(asker: Asker, kind: str, path: Path, raw: bytes | None) -> int:
    before = state(asker.visit)
    status, reply = await post(asker, kind, changed(BODIES[kind], path, raw))
    case = (kind, named(path), (raw or b"nothing")[:40], status, reply)
    if status == 200:
        return status
    unknown = path in (("model",), ("previous_response_id",))
    assert status == 400 or (unknown and status == 404), case
    start = "" if not kind.startswith("reward") else "reward"
    assert names(reply["error"]["param"], path, start), case
    assert reply["error"]["message"].startswith(re.split(r"[.\[]", reply["error"]["param"])[0]), (
        case
    )
    assert state(asker.visit) == before, case
    return status


@pytest.mark.parametrize("kind", BODIES)
def test_every_field_by_every_json_type(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", TOKEN)
    told = {"unforced_tools": True, "keep_sampling": True}

    async def body(asker: Asker) -> None:
        first = await asker.ask("a", "start", n=2)
        heard = {"role": "assistant", "content": first["choices"][1]["message"]["content"]}
        assert (await post(asker, kind, json.dumps(BODIES[kind]).encode()))[0] == 200
        for path in nodes(BODIES[kind]):
            await refused_or_answered(asker, kind, path, None)
            for raw in WELL_FORMED:
                await refused_or_answered(asker, kind, path, raw)
            for raw in NEVER_RIGHT:
                assert await refused_or_answered(asker, kind, path, raw) == 400, (
                    kind,
                    named(path),
                    raw[:40],
                )
        assert (await post(asker, kind, json.dumps(BODIES[kind]).encode()))[0] == 200
        await asker.say("a", "start", heard, "go on", stop=["last"])

    turns = played(body, numbered(), limits=EpisodeLimits(max_turns=10**6), program=told).turns
    (end,) = [t for t in turns if "last" in t.sampling.stop]
    start = turns[1].prompt_ids + turns[1].token_ids
    assert [t.taken for t in turns[:2]] == [False, True] and end.prompt_ids[: len(start)] == start


WRONG = [
    ("chat", ("messages", 0, "role"), b'{"a": 1}', "messages[0].role"),
    ("chat", ("messages", 1, "content", 0, "type"), b"[]", "messages[1].content[0].type"),
    (
        "chat",
        ("messages", 2, "tool_calls", 0, "function", "arguments"),
        b"{}",
        "messages[2].tool_calls[0].function.arguments",
    ),
    ("chat", ("messages", 3, "tool_call_id"), b"7", "messages[3].tool_call_id"),
    ("chat", ("stream",), b'"no"', "stream"),
    ("chat", ("logprobs",), b"1", "logprobs"),
    ("chat", ("max_tokens",), b"0", "max_tokens"),
    ("chat", ("metadata", "k"), b"{}", "metadata.k"),
    ("chat", ("top_k",), b"1.5", "top_k"),
    ("chat", ("tools", 0, "function", "parameters"), b'"x"', "tools[0].function.parameters"),
    (
        "chat",
        ("response_format", "json_schema", "schema"),
        b"[]",
        "response_format.json_schema.schema",
    ),
    ("forced", ("tool_choice", "function", "name"), b"[]", "tool_choice.function.name"),
    ("held", ("structured_outputs", "choice", 0), b"1", "structured_outputs.choice[0]"),
    ("response", ("input", 3, "call_id"), b"{}", "input[3].call_id"),
    ("response", ("text", "format", "schema"), b"1", "text.format.schema"),
    ("response", ("max_output_tokens",), b'"x"', "max_output_tokens"),
    ("response", ("include", 0), b"{}", "include[0]"),
    ("rewards", (0, "turn"), b"true", "reward[0].turn"),
    ("rewards", (1,), b'"x"', "reward[1].value"),
    ("reward", ("name",), b"{}", "reward.name"),
]


def test_the_field_is_named_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", TOKEN)

    async def body(asker: Asker) -> None:
        await asker.ask("a", "start", n=2)
        for kind, path, raw, field in WRONG:
            before = state(asker.visit)
            status, reply = await post(asker, kind, changed(BODIES[kind], path, raw))
            assert (status, reply["error"]["param"]) == (400, field), reply
            assert reply["error"]["message"].startswith(
                field.removesuffix(".value") if "reward" in kind else field
            )
            assert state(asker.visit) == before

    played(body, numbered(), program={"unforced_tools": True})


NO_JSON = [
    b"",
    b"nope",
    b"{",
    b'"',
    b'"\\',
    b"\xff",
    b'{"model": "\xff"}',
    "{}".encode("utf-16"),
    b"null",
    b"1",
    b'"x"',
    b"[]",
    b"[1, 2]",
    DEEP,
    b"[" * 100_000,
    b'{"model": ' * 100_000,
    b'{"model": "a", "model": "b"}',
    b'{"\\ud800": 1}',
    b'{"": 1}',
]


def test_what_is_no_object_at_all() -> None:
    async def body(asker: Asker) -> None:
        before = state(asker.visit)
        for kind in ("chat", "response"):
            for raw in NO_JSON:
                status, reply = await post(asker, kind, raw)
                assert status == 400 and reply["error"]["message"], (kind, raw[:40], reply)
        _, reply = await post(asker, "chat", b'{"model": "a", "messages": ' + DEEP + b"}")
        assert reply["error"]["param"] == "messages"
        _, reply = await post(asker, "chat", b'{"model": "a", "model": "b"}')
        assert reply["error"]["message"] == "model: given twice in one object"
        assert state(asker.visit) == before
        assert await asker.say("a", "x") == "1.0"

    played(body, numbered())


def test_a_body_of_too_many_values_is_refused_at_once() -> None:
    """Whatever a program sends, the loop that serves all episodes is not held up by it."""
    raw = b'{"model": "a", "messages": [], "tools": [' + b"[],0," * 1_600_000 + b"0]}"

    async def body(asker: Asker) -> None:
        start = time.process_time()
        status, reply = await asker.post("/chat/completions", raw)
        assert status == 400 and reply["error"]["message"].startswith("tools["), reply
        assert time.process_time() - start < 5

    played(body)


def test_lists_have_a_length() -> None:
    async def body(asker: Asker) -> None:
        many = [{"role": "user", "content": "x"}] * (MAX_ITEMS + 1)
        for path, asked, field in (
            ("/chat/completions", chat("a", *many), "messages"),
            ("/responses", {"model": "a", "input": many}, "input"),
            (
                "/chat/completions",
                chat("a", {"role": "user", "content": [{"type": "text", "text": "x"}] * len(many)}),
                "messages[0].content",
            ),
            (
                "/chat/completions",
                chat("a", "x", logit_bias={str(i): 1 for i in range(len(many))}),
                "logit_bias",
            ),
            ("/chat/completions", chat("a", "x", **{"k" * 10**6: 1}), "k" * 80),
        ):
            status, reply = await asker.post(path, asked)
            assert (status, reply["error"]["param"]) == (400, field) and len(
                reply["error"]["message"]
            ) < 3000

    played(body)


HEADERS = [
    {"x-stainless-retry-count": "9" * 5000},
    {"x-stainless-retry-count": "٣"},
    {"x-stainless-retry-count": "²"},
    {"Content-Type": "text/plain; charset=nonsense"},
    {"Idempotency-Key": "x" * 5000},
]


def test_headers_of_any_kind_are_no_fault_of_ours() -> None:
    async def body(asker: Asker) -> None:
        for head in HEADERS:
            assert (await asker.post("/chat/completions", chat("a", "x"), head))[0] == 200, head
        for kind in ("gzip", "deflate", "br", "zstd", "zz"):
            status, reply = await asker.post(
                "/chat/completions", chat("a", "x"), {"Content-Encoding": kind}
            )
            assert status == 400 and reply["error"]["message"].startswith("Content-Encoding: "), (
                kind,
                reply,
            )
        status, reply = await asker.post("/chat/completions", chat("a", "x"), key="\udcff")
        assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        status, reply = await asker.post("/chat/completions", b'"' + b"x" * (9 << 20) + b'"')
        assert status == 413 and reply["error"]["message"]

    played(body)


@pytest.mark.parametrize(
    "arguments", ["[" * 100_000, '{"x": "\\ud800"}', "9" * 5000, "1e999", '{"x": 1, "x": 2}', "no"]
)
def test_arguments_that_are_no_json_within_bounds_stay_text(arguments: str) -> None:
    """A program may send back what a model wrote, whatever that is."""
    engine = ScriptedEngine(lambda *_: "15", context=10**6)

    async def body(asker: Asker) -> None:
        called = {**CALLED, "function": {"name": "calc", "arguments": arguments}}
        await asker.say(
            "a",
            "x",
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "content": "1"},
        )

    (turn,) = played(body, engine).turns
    assert json.dumps(arguments)[:40] in turn.messages[1].content and loaded(arguments) == arguments


def test_json_within_bounds_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert (
        loaded('{"x": 1}') == {"x": 1}
        and loaded(deep) == json.loads(deep)
        and loaded(f"[{deep}]") == f"[{deep}]"
    )


def test_a_refused_call_settles_no_earlier_one() -> None:
    """What is wrong with a call that goes on with a sibling is found before that sibling counts as
    the one gone on with."""

    async def body(asker: Asker) -> None:
        first = await asker.ask("a", "pick", n=2)
        one, two = (
            {"role": "assistant", "content": c["message"]["content"]} for c in first["choices"]
        )
        for settings in ({"top_p": 0}, {}):
            last = "why?" if settings else {"role": "assistant", "content": "because"}
            status, _ = await asker.post(
                "/chat/completions", chat("a", "pick", two, last, **settings)
            )
            assert status == 400
        await asker.say("a", "pick", one, "why?")

    turns = played(body, numbered(), program={"keep_sampling": True}).turns
    assert [(t.index, t.sibling, t.taken) for t in turns] == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, True),
    ]


def test_of_several_posted_rewards_all_or_none_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARLORA_REWARD_TOKEN", TOKEN)

    async def body(asker: Asker) -> None:
        await asker.ask("a", "x")
        status, _ = await post(asker, "rewards", b"[1, 2, {}]")
        assert status == 400 and asker.visit.team.rewards == [] and not asker.visit.posted.is_set()

    played(body)
