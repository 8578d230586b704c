"""The gateway: what programs ask and are told, who may ask, and what becomes of retries."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from marlora.agents.state import TeamState
from marlora.agents.types import AgentSpec, Message, Sampling, Turn, Usage
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.episodes.runner import EpisodeLimits
from marlora.rollouts.gateway.api.chat import usage
from tests.rollouts.asking import Asker, chat, numbered, play, played

CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "adds",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = 'Let me see.\n<tool_call>\n{"name": "calc", "arguments": {"x": 1}}\n</tool_call>'
SCHEMA = {"type": "object"}
USED = Sampling(max_tokens=64)


def test_usage_counts_a_prompt_once_and_an_outside_model_by_its_report() -> None:
    turns = [Turn(0, "a", sibling=k, prompt_ids=(1,) * 4, token_ids=(2,) * 3) for k in range(2)]
    assert usage(turns) == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    outside = [Turn(0, "a", text="x", usage=Usage(1, 12, 9)), Turn(0, "a", text="y", sibling=1)]
    assert usage(outside) == {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21}


# what is asked


def test_a_call_is_a_turn_of_the_agent_it_names() -> None:
    async def body(asker: Asker) -> str:
        reply = await asker.ask("a", {"role": "system", "content": "Be brief."}, "2+2?")
        assert reply["object"] == "chat.completion" and reply["model"] == "a"
        (choice,) = reply["choices"]
        assert (
            choice["message"] == {"role": "assistant", "content": "15", "refusal": None}
            and choice["finish_reason"] == "stop"
        )
        assert reply["usage"]["completion_tokens"] == 3  # two bytes and the end
        return await asker.say("agent:b", f"check {choice['message']['content']}")

    episode = played(body)
    assert episode.output == "15" and [(t.index, t.agent, t.reads) for t in episode.turns] == [
        (0, "a", ()),
        (1, "b", (0,)),
    ]
    assert episode.turns[0].messages == (Message("system", "Be brief."), Message("user", "2+2?"))
    assert (
        episode.turns[0].source == "sampled"
        and episode.usage["a"].calls == 1
        and episode.usage["b"].sampled_tokens == 3
    )


def test_models_are_the_team_and_an_unknown_one_is_told_who_is_there() -> None:
    async def body(asker: Asker) -> None:
        status, found = await asker.get("/models")
        assert status == 200 and [m["id"] for m in found["data"]] == ["a", "b", "gpt-4o"]
        assert (await asker.get("/models/b"))[1]["owned_by"] == "b"
        status, error = await asker.post("/chat/completions", chat("aa", "hi"))
        assert status == 404 and error["error"]["code"] == "model_not_found"
        assert (
            error["error"]["message"]
            == "model 'aa': no such agent; did you mean 'a'? (all: a, b, gpt-4o)"
        )
        await asker.ask("gpt-4o", "hi")

    episode = played(body, program={"models": {"gpt-4o": "b"}})
    assert [t.agent for t in episode.turns] == ["b"]  # the refused call is no turn


def test_a_call_that_extends_an_earlier_one_goes_on_with_its_tokens() -> None:
    engine = numbered()

    async def body(asker: Asker) -> None:
        first = await asker.say("a", "one")
        said = {"role": "assistant", "content": first}
        await asker.say("a", "one", said, "two")
        await asker.say("a", "one", {"role": "assistant", "content": "not what it said"}, "two")
        await asker.say("b", "one", said, "two")  # another agent's chat: for b it is a new one

    one, two, other, foreign = played(body, engine).turns
    start = one.prompt_ids + one.token_ids
    assert two.prompt_ids[: len(start)] == start and two.messages[:2] == (
        *one.messages,
        Message("assistant", one.text),
    )
    assert other.prompt_ids[: len(start)] != start
    assert foreign.messages == two.messages and foreign.agent == "b"
    assert foreign.reads == ()  # the answer stands as the assistant's


def test_n_gives_siblings_and_the_one_gone_on_with_is_taken() -> None:
    async def body(asker: Asker) -> None:
        reply = await asker.ask("a", "pick", n=3)
        texts = [c["message"]["content"] for c in reply["choices"]]
        assert texts == ["1.0", "1.1", "1.2"] and reply["usage"]["completion_tokens"] == 12
        await asker.say("a", "pick", {"role": "assistant", "content": "1.1"}, "why?")
        await asker.say(
            "a", "pick", {"role": "assistant", "content": "1.2"}, "why?"
        )  # a second heir does not change it

    *siblings, why, _ = played(body, numbered()).turns
    assert [(t.index, t.sibling, t.taken) for t in siblings] == [
        (0, 0, False),
        (0, 1, True),
        (0, 2, False),
    ]
    assert (
        why.prompt_ids[: len(siblings[1].prompt_ids) + 4]
        == siblings[1].prompt_ids + siblings[1].token_ids
    )


def test_tools_are_shown_called_and_answered() -> None:
    engine = ScriptedEngine(lambda prompt, *_: "It is 15." if "tool_response" in prompt else CALL)

    async def body(asker: Asker) -> str:
        ask = {"role": "user", "content": "add"}
        reply = await asker.ask("a", ask, tools=[CALC])
        (choice,) = reply["choices"]
        assert (
            choice["finish_reason"] == "tool_calls"
            and choice["message"]["content"] == "Let me see."
        )
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function" and call["function"] == {
            "name": "calc",
            "arguments": '{"x": 1}',
        }
        call["function"]["arguments"] = '{"x":1}'  # clients write it again in their own way
        answer = {"role": "tool", "tool_call_id": call["id"], "content": "15"}
        return await asker.say("a", ask, choice["message"], answer, tools=[CALC])

    one, two = played(body, engine).turns
    assert one.messages[0].role == "system" and '"name": "calc"' in one.messages[0].content
    assert (
        one.text == CALL and two.messages[2].content == CALL
    )  # what was sampled, not what the program was shown
    start = one.prompt_ids + one.token_ids
    assert two.prompt_ids[: len(start)] == start and two.text == "It is 15."
    assert "<tool_response>\n15\n</tool_response>" in engine.tokens.show(two.prompt_ids)


def test_calls_are_calls_only_where_tools_were_given_and_can_be_read() -> None:
    texts = iter([CALL, "<tool_call>{broken</tool_call>", CALL])
    engine = ScriptedEngine(lambda *_: next(texts))

    async def body(asker: Asker) -> None:
        assert await asker.say("a", "1") == CALL
        assert await asker.say("a", "2", tools=[CALC]) == "<tool_call>{broken</tool_call>"
        assert await asker.say("a", "3", tools=[CALC], tool_choice="none") == CALL

    assert [len(t.messages) for t in played(body, engine).turns] == [1, 2, 1]


def test_a_call_that_a_program_forces_is_the_agents_own_if_the_run_says_so() -> None:
    texts = iter([CALL, "No."])
    engine = ScriptedEngine(lambda *_: next(texts))
    forced = {"tools": [CALC], "tool_choice": {"type": "function", "function": {"name": "calc"}}}

    async def body(asker: Asker) -> None:
        (choice,) = (await asker.ask("a", "add", tools=[CALC], tool_choice="required"))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert await asker.say("a", "add again", **forced) == "No."

    assert all(
        t.sampling.on_policy for t in played(body, engine, program={"unforced_tools": True}).turns
    )


def test_a_chat_of_another_model_can_be_brought_along() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "calc", "arguments": '{"x":1}'}}]

    async def body(asker: Asker) -> None:
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        await asker.say(
            "a", "add", called, {"role": "tool", "content": [{"type": "text", "text": "1"}]}
        )

    (turn,) = played(body).turns
    assert turn.messages[1] == Message(
        "assistant", '<tool_call>\n{"name": "calc", "arguments": {"x": 1}}\n</tool_call>'
    )
    assert turn.messages[2].content == "1"


def test_streaming_tells_the_same_in_pieces() -> None:
    async def body(asker: Asker) -> None:
        status, text = await asker.post(
            "/chat/completions",
            chat("a", "hi", stream=True, stream_options={"include_usage": True}),
        )
        *events, end = text.strip().split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert (
            status == 200
            and end == "data: [DONE]"
            and {c["object"] for c in chunks} == {"chat.completion.chunk"}
        )
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "15"}
        assert (
            chunks[1]["choices"][0]["finish_reason"] == "stop"
            and chunks[2]["usage"]["completion_tokens"] == 3
        )

    played(body)


def test_log_probs_are_the_engines_by_token_id() -> None:
    async def body(asker: Asker) -> list[Any]:
        return (await asker.ask("a", "hi", logprobs=True))["choices"][0]["logprobs"]["content"]

    episode = played(lambda asker: _as_json(body(asker)))
    (turn,) = episode.turns
    told = json.loads(str(episode.output))
    assert [(t["token"], t["logprob"]) for t in told] == [
        (f"token_id:{i}", x) for i, x in zip(turn.token_ids, turn.logprobs, strict=True)
    ]


async def _as_json(work: Any) -> str:
    return json.dumps(await work)


def test_the_run_samples_and_the_program_may_shorten() -> None:
    async def body(asker: Asker) -> None:
        asked = {"temperature": 0.3, "top_p": 0.5, "seed": 7, "max_tokens": 500}
        assert (
            await asker.say("a", "hi", **asked, stop=["5"]) == "1"
        )  # the program is shown no stop string
        await asker.say("a", "hi", max_completion_tokens=2, temperature=0)

    one, two = played(body, sampling=USED).turns
    assert (
        one.text == "15" and one.sampling.stop == ("5",) and one.sampling.max_tokens == 64
    )  # but it was sampled
    assert (one.sampling.temperature, one.sampling.top_p, two.sampling.max_tokens) == (1.0, 1.0, 2)
    assert one.sampling.on_policy and one.sampling.seed not in (7, two.sampling.seed)
    one, two = played(body, sampling=USED, program={"keep_sampling": True}).turns
    assert (one.sampling.temperature, one.sampling.top_p, two.sampling.temperature) == (
        0.3,
        0.5,
        0.0,
    )
    assert not one.sampling.on_policy  # marked: fit for SFT, refused for ratios


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"choice": ["yes", "no"]}),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_what_is_held_to_a_grammar_is_marked(asked: dict[str, Any], held: Any) -> None:
    (turn,) = played(lambda asker: asker.say("a", "hi", **asked)).turns
    assert turn.sampling.grammar == (
        json.dumps(held) if held else ""
    ) and turn.sampling.on_policy == (held is None)


def test_what_is_biased_is_marked() -> None:
    (turn,) = played(lambda asker: asker.say("a", "hi", logit_bias={"15": -100})).turns
    assert turn.sampling.logit_bias == {"15": -100.0} and not turn.sampling.on_policy


def test_a_prompt_of_the_run_stands_in_place_of_the_programs() -> None:
    spec = AgentSpec("a", prompt="Mine.", demos=(Message("user", "1"), Message("assistant", "2")))
    (turn,) = played(
        lambda asker: asker.say("a", {"role": "developer", "content": "Yours."}, "hi"),
        agents=[spec],
    ).turns
    assert [(m.role, m.content) for m in turn.messages] == [
        ("system", "Mine."),
        ("user", "1"),
        ("assistant", "2"),
        ("user", "hi"),
    ]
    (turn,) = played(
        lambda asker: asker.say("a", "hi"),
        agents=["a"],
        state=TeamState(values={"a.prompt": "Learnt."}),
    ).turns
    assert turn.messages[0] == Message("system", "Learnt.")


BAD = [
    ([], "expected a JSON object"),
    ({"messages": [{"role": "user", "content": "x"}]}, "model: expected a text, got null"),
    (chat("a"), "messages: expected at least one"),
    (chat("a", {"role": "king", "content": "x"}), "messages[0].role: expected one of"),
    (
        chat("a", {"role": "user", "content": [{"type": "image_url"}]}),
        "messages[0].content[0].type: only text can be read here",
    ),
    (chat("a", {"role": "assistant", "content": "x"}), "messages: the last one is the assistant's"),
    (chat("a", "x", n=0), "n: expected a whole number from 1 to 64, got 0"),
    (chat("a", "x", n=True), "n: expected a whole number"),
    (chat("a", "x", max_tokens=-1), "max_tokens: expected"),
    (chat("a", "x", temprature=1), "temprature: not understood here; did you mean 'temperature'?"),
    (chat("a", "x", temperature="hot"), "temperature: expected a finite number"),
    (chat("a", "x", stop=[""]), "stop[0]: expected"),
    (chat("a", "x", top_logprobs=3), "top_logprobs: only 0"),
    (
        chat("a", "x", tools=[{"type": "web_search"}]),
        "tools[0]: expected an object of type function",
    ),
    (
        chat("a", "x", tools=[CALC], tool_choice="any"),
        "tool_choice: expected auto, none, required or a tool, got 'any'",
    ),
    (
        chat("a", "x", tools=[CALC], tool_choice="required"),
        "tool_choice: a call cannot be forced here; system.unforced_tools",
    ),
    (chat("a", "x", response_format={"type": "xml"}), "response_format: expected type"),
    (chat("a", "x", logit_bias={"word": 1}), "logit_bias: expected"),
    ("{", "the body is not JSON"),
    ("[" * 100_000, "the body: nested more than 64 deep"),
]


def test_what_cannot_be_understood_is_refused_with_words() -> None:
    async def body(asker: Asker) -> None:
        for asked, problem in BAD:
            status, error = await asker.post("/chat/completions", asked)
            assert status == 400 and error["error"]["message"].startswith(problem), (
                asked,
                status,
                error,
            )

    episode = played(body)
    assert episode.turns == () and episode.output == ""


def test_responses_are_chats_too() -> None:
    engine = ScriptedEngine(lambda prompt, *_: "It is 15." if "tool_response" in prompt else CALL)
    tool = {"type": "function", **CALC["function"], "strict": True}  # type: ignore[dict-item]

    async def body(asker: Asker) -> str:
        first = {"model": "a", "input": "add", "instructions": "Be brief.", "tools": [tool]}
        status, one = await asker.post("/responses", first)
        assert status == 200 and one["status"] == "completed", one
        text, call = one["output"]
        assert text["content"][0]["text"] == "Let me see." and (call["type"], call["name"]) == (
            "function_call",
            "calc",
        )
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "15"}
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
            text,
            call,
            result,
        ]
        _, two = await asker.post("/responses", {**first, "input": items})
        _, three = await asker.post(
            "/responses", {**first, "input": [result], "previous_response_id": one["id"]}
        )
        assert two["output"][0]["content"] == three["output"][0]["content"]
        _, events = await asker.post("/responses", {**first, "stream": True})
        kinds = [
            line.removeprefix("event: ")
            for line in events.splitlines()
            if line.startswith("event: ")
        ]
        assert (
            kinds[0] == "response.created"
            and kinds[-1] == "response.completed"
            and "response.output_text.delta" in kinds
        )
        status, error = await asker.post("/responses", {**first, "previous_response_id": "gone"})
        assert status == 404 and "no such response" in error["error"]["message"]
        return two["output"][0]["content"][0]["text"]

    episode = played(body, engine)
    one, two, three, _ = episode.turns
    assert episode.output == "It is 15." and two.messages[0].content.startswith(
        "Be brief.\n\n# Tools"
    )
    assert (
        two.prompt_ids == three.prompt_ids
        and two.prompt_ids[: len(one.prompt_ids)] == one.prompt_ids
    )


def test_the_openai_client_gets_what_it_expects() -> None:
    """The real client: chat, tools, a typed answer, streams, several answers, responses, models,
    errors of its own types."""
    engine = ScriptedEngine(
        lambda prompt, ref, sampling, k: CALL if "# Tools" in prompt else '{"total": 15}'
    )

    class Total(pydantic.BaseModel):
        total: int

    async def body(asker: Asker) -> str:
        async with openai.AsyncOpenAI(
            base_url=asker.visit.base_url, api_key=asker.visit.key
        ) as client:
            ask: Any = {"model": "a", "messages": [{"role": "user", "content": "7+8?"}]}
            assert [m.id async for m in client.models.list()] == ["a", "b"]
            called = (
                (await client.chat.completions.create(**ask, tools=[CALC]))
                .choices[0]
                .message.tool_calls
            )
            assert called and called[0].function.name == "calc"
            typed = await client.chat.completions.parse(**ask, response_format=Total)
            assert typed.choices[0].message.parsed == Total(total=15)
            async with client.chat.completions.stream(**ask, tools=[CALC]) as stream:
                assert (await stream.get_final_completion()).choices[
                    0
                ].finish_reason == "tool_calls"
            assert len((await client.chat.completions.create(**ask, n=3)).choices) == 3
            async with client.responses.stream(model="b", input="7+8?") as events:
                assert (await events.get_final_response()).output_text == '{"total": 15}'
            with pytest.raises(
                openai.NotFoundError, match=r"no such agent; known: 'a', 'b' \(all: a, b\)"
            ):
                await client.chat.completions.create(model="zzz", messages=ask["messages"])
            with pytest.raises(openai.BadRequestError, match="n: expected a whole number"):
                await client.chat.completions.create(**ask, n=100)
            return "done"

    turns = played(body, engine).turns
    assert [(t.agent, t.sibling) for t in turns] == [("a", 0)] * 4 + [("a", 1), ("a", 2), ("b", 0)]
    assert [t.sampling.on_policy for t in turns] == [True, False, *[True] * 5]


# failures


def test_a_prompt_that_is_too_long_is_told_and_is_why_the_program_failed() -> None:
    async def careless(asker: Asker) -> None:
        status, error = await asker.post("/chat/completions", chat("a", "x" * 5000))
        assert status == 400 and error["error"]["code"] == "context_length_exceeded"
        raise RuntimeError("no reply")

    async def careful(asker: Asker) -> str:
        await asker.post("/chat/completions", chat("a", "x" * 5000))
        return await asker.say("a", "short")

    failed = play(careless)
    assert failed.stop_reason == "context" and "do not fit" in str(failed.error)
    assert played(careful).output == "15"


def test_a_dead_engine_ends_the_episode_whatever_the_program_makes_of_it() -> None:
    async def stubborn(asker: Asker) -> None:
        while True:
            await asker.post("/chat/completions", chat("a", "x"))

    with pytest.raises(EngineError, match="scripted fault"):
        play(stubborn, ScriptedEngine(lambda *_: "15", faults={1: Fault("raise")}))


def test_too_many_turns_end_the_episode() -> None:
    async def endless(asker: Asker) -> None:
        while True:
            await asker.post("/chat/completions", chat("a", "x"))

    episode = play(endless, limits=EpisodeLimits(max_turns=5))
    assert episode.stop_reason == "limit" and len(episode.turns) == 5


def test_a_call_without_an_answer_in_time_gets_an_error_and_the_episode_goes_on() -> None:
    async def body(asker: Asker) -> str:
        status, error = await asker.post("/chat/completions", chat("a", "x"))
        assert status == 504 and error["error"]["code"] == "timeout"
        return await asker.say("a", "y")

    engine = ScriptedEngine(lambda *_: "15", faults={0: Fault("stall")})
    episode = played(body, engine, program={"call_timeout": 0.2})
    assert episode.output == "15" and [t.index for t in episode.turns] == [1]
