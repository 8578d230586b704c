"""Chats: they grow by appending, siblings, choices, a loop of tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from marlora.agents.chat import Agent, Services
from marlora.agents.seeds import derive_seed
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.transcript import Call
from marlora.agents.types import AgentSpec, Completion, Message, Sampling, SettingError, Turn
from tests.agents.teams import run, slow_team

# --- chats


def test_a_chat_grows_by_appending_and_fresh_starts_a_new_one() -> None:
    calls: list[Call] = []

    async def ask(call: Call) -> list[Completion]:
        calls.append(call)
        return [Completion(f"answer {call.index}")]

    async def play() -> None:
        agent = team["a"]
        await agent.reply("one")
        await agent.reply("two")
        await agent.fresh().reply("three")

    team = Team(
        [
            AgentSpec(
                "a", prompt="You are a.", demos=(Message("user", "u"), Message("assistant", "v"))
            )
        ],
        Services(ask),
    )
    run(play)
    head = (Message("system", "You are a."), Message("user", "u"), Message("assistant", "v"))
    one = head + (Message("user", "one"),)
    assert team.turns[0].messages == one
    assert team.turns[1].messages == one + (
        Message("assistant", "answer 0"),
        Message("user", "two"),
    )
    assert team.turns[2].messages == head + (Message("user", "three"),)
    assert [call.previous for call in calls] == [None, team.turns[0], None]


def test_one_agent_takes_over_the_chat_of_another() -> None:
    writer, critic = (
        AgentSpec("writer", prompt="You write."),
        AgentSpec("critic", prompt="You criticise."),
    )
    team = fake_team([writer, critic], lambda agent, messages: f"{agent} says {len(messages)}")

    async def play() -> Agent:
        draft = await team["writer"].reply("Write.", saw_gold=True)
        other = team["critic"].take_over(team["writer"])
        turn = await other.reply("Is it good?")
        assert (turn.agent, turn.reads, turn.saw_gold) == ("critic", (draft.index,), True)
        return other

    chat = [(m.role, m.content) for m in asyncio.run(play()).chat]
    assert chat == [
        ("system", "You criticise."),
        ("user", "Write."),
        ("assistant", "writer says 2"),
        ("user", "Is it good?"),
        ("assistant", "critic says 4"),
    ]
    assert len(team["writer"].chat) == 3 and team["critic"].chat == ()


def test_a_busy_chat_refuses_a_second_question() -> None:
    async def play() -> None:
        agent = team["a"]
        first = asyncio.ensure_future(agent.reply("one"))
        with pytest.raises(
            SettingError,
            match=r"'a' is still answering in this chat; await it, or use agent.fresh\(\)",
        ):
            agent.reply("two")
        await asyncio.gather(first, agent.fresh().reply("beside"))
        await agent.reply("three")

    team, _ = slow_team("a", [3, 3, 3])
    run(play)
    assert [turn.messages[-1].content for turn in team.turns] == ["one", "beside", "three"]


def test_a_failed_call_leaves_the_chat_as_it_was() -> None:
    async def ask(call: Call) -> list[Completion]:
        if "long" in call.messages[-1].content:
            raise ValueError("does not fit")
        return [Completion("ok")]

    async def play() -> None:
        await team["a"].reply("one")
        with pytest.raises(ValueError, match="does not fit"):
            await team["a"].reply("long long")
        await team["a"].reply("short")

    team = Team([AgentSpec("a")], Services(ask))
    run(play)
    assert [(t.index, [m.content for m in t.messages]) for t in team.turns] == [
        (0, ["one"]),
        (2, ["one", "ok", "short"]),
    ]


def test_values_override_prompts_and_demos() -> None:
    spec = AgentSpec("a", prompt="old", demos=(Message("user", "old"),))
    values = {
        "a.prompt": "new",
        "a.demos": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
        "b.prompt": "no",
    }
    team = fake_team([spec], lambda agent, messages: "x", values=values)
    run(lambda: team["a"].reply("hi"))
    expected = [("system", "new"), ("user", "q"), ("assistant", "r"), ("user", "hi")]
    assert [(m.role, m.content) for m in team.turns[0].messages] == expected
    team = fake_team(
        [spec], lambda agent, messages: "x", values={"a.demos": [{"role": "user", "text": "q"}]}
    )
    with pytest.raises(SettingError, match=r"a.demos.text: unknown field"):
        team["a"].reply("hi")


def test_sampling_of_call_agent_and_run() -> None:
    async def play() -> None:
        await team["a"].reply("x")
        await team["b"].reply("x")
        await team["b"].reply("x", sampling=Sampling(temperature=0.3, seed=5))

    specs = [AgentSpec("a"), AgentSpec("b", sampling=Sampling(temperature=0.2))]
    team = fake_team(specs, lambda agent, messages: "x", sampling=Sampling(temperature=0.1))
    run(play)
    assert [turn.sampling.temperature for turn in team.turns] == [0.1, 0.2, 0.3]
    assert team.turns[2].sampling.seed == 5


# --- siblings


def test_siblings_are_recorded_and_one_is_taken() -> None:
    async def later(turns: Sequence[Turn]) -> int:
        await asyncio.sleep(0)
        return 1

    async def play() -> list[str]:
        agent = team["a"]
        texts = [
            str(await agent.reply("x", n=3)),
            str(await agent.reply("y", n=3, choose=lambda turns: 2)),
        ]
        texts.append(str(await agent.reply("z", n=2, choose=later)))
        assert team.siblings(team.turns[0]) == team.turns[:3]
        return texts

    team, calls = slow_team("a", [0] * 3)
    assert run(play) == ["0.0", "1.2", "2.1"]
    assert [(t.index, t.sibling, t.taken) for t in team.turns] == [
        (0, 0, True),
        (0, 1, False),
        (0, 2, False),
        (1, 0, False),
        (1, 1, False),
        (1, 2, True),
        (2, 0, False),
        (2, 1, True),
    ]
    assert [m.content for m in team.turns[-1].messages] == ["x", "0.0", "y", "1.2", "z"]
    assert [call.n for call in calls] == [3, 3, 2] and calls[2].previous == team.turns[5]


def test_an_agent_may_choose() -> None:
    async def play() -> Turn:
        async def judged(turns: Sequence[Turn]) -> int:
            return int((await team["b"].reply("which?", reads=turns)).index)

        return await team["a"].reply("x", n=2, choose=judged)

    team, _ = slow_team("ab", [0, 0])
    assert run(play).sibling == 1
    assert team.turns[2].reads == (0,)


def test_a_whole_list_of_messages_is_answered_as_it_is() -> None:
    """As programs send it: no prompt of the agent's is added, its own chat is not touched, the
    index is taken at the call."""
    team = fake_team(
        [AgentSpec("a", prompt="Mine.")], lambda agent, messages: str(len(messages)), seed=3
    )
    told = (Message("system", "Yours."), Message("user", "hi"))

    async def play() -> list[Turn]:
        late, soon = team["a"].answer(told, reads=(1, 0), n=2), team["a"].reply("hi")
        await soon
        first = await late
        on = (*told, Message("assistant", first.text), Message("user", "go on"))
        return [first, await team["a"].answer(on, first, sampling=Sampling(max_tokens=7))]

    first, second = run(play)
    assert (first.index, first.messages, first.reads, first.text) == (0, told, (0, 1), "2") and len(
        team["a"].chat
    ) == 3
    assert (second.index, second.text, second.sampling.max_tokens) == (2, "4", 7)
    assert second.sampling.seed == derive_seed(3, "a", 2) and len(team.siblings(first)) == 2
    with pytest.raises(SettingError, match=r"answer\(n=0\), expected n >= 1"):
        team["a"].answer(told, n=0)


def test_what_was_taken_can_be_settled_afterwards() -> None:
    team = fake_team(["a"], lambda agent, messages: "x")
    turn = run(lambda: team["a"].answer([Message("user", "hi")], n=3))
    assert [t.taken for t in team.siblings(turn)] == [True, False, False]
    team.select(team.siblings(turn)[2])
    assert [t.taken for t in team.siblings(turn)] == [False, False, True]
    team.select(team.siblings(turn)[2], taken=False)
    assert [t.taken for t in team.siblings(turn)] == [False, False, False]


def test_wrong_choices_and_counts() -> None:
    team, _ = slow_team("a", [0] * 4)
    with pytest.raises(SettingError, match="choose returned 2, expected a number below 2"):
        run(lambda: team["a"].reply("x", n=2, choose=lambda turns: 2))
    with pytest.raises(SettingError, match="expected n >= 1"):
        team["a"].reply("x", n=0)

    async def stingy(call: Call) -> list[Completion]:
        return [Completion("x")]

    with pytest.raises(RuntimeError, match="asked for 2 completions, got 1"):
        run(lambda: Team([AgentSpec("a")], Services(stingy))["a"].reply("x", n=2))


# --- tools


CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
CALCULATING = AgentSpec("a", prompt="You count.", tools=("calculator",))


def test_tool_loop() -> None:
    team = fake_team(
        [CALCULATING, "b"], lambda agent, messages: CALL if messages[-1].content == "6*7?" else "42"
    )

    async def play() -> Turn:
        first, second = team["a"].reply("6*7?"), team["b"].reply("and you?")
        await second
        return await first

    assert str(run(play)) == "42"
    assert [(turn.index, turn.agent) for turn in team.turns] == [
        (0, "a"),
        (1, "a"),
        (5, "b"),
    ]  # 1 to 4 kept for tool calls
    assert team.turns[0].messages[0].content.startswith("You count.\n\n# Tools")
    assert [(m.role, m.content) for m in team.turns[1].messages[1:]] == [
        ("user", "6*7?"),
        ("assistant", CALL),
        ("user", "<tool_response>\n42\n</tool_response>"),
    ]
    assert len(team.turns[2].messages) == 1  # no tools, no system message


def test_tool_loop_has_a_limit() -> None:
    team = fake_team([CALCULATING], lambda agent, messages: CALL, max_tool_calls=2)
    assert str(run(lambda: team["a"].reply("go"))) == CALL
    assert [turn.index for turn in team.turns] == [0, 1, 2]
    assert [turn.sampling.seed for turn in team.turns] == [derive_seed(0, "a", k) for k in range(3)]


COUNTED: list[str] = []


def counted(word: str) -> int:
    COUNTED.append(word)
    return len(COUNTED)


def test_a_call_beyond_the_limit_is_not_run() -> None:
    COUNTED.clear()
    call = '<tool_call>{"name": "counted", "arguments": {"word": "x"}}</tool_call>'
    team = fake_team(
        [AgentSpec("a", tools=(f"{__name__}:counted",))],
        lambda agent, messages: call,
        max_tool_calls=2,
    )
    run(lambda: team["a"].reply("go"))
    assert (len(team.turns), len(COUNTED)) == (3, 2)


def test_several_calls_of_one_reply_are_answered_together() -> None:
    two = CALL + '<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call>'
    team = fake_team([CALCULATING], lambda agent, messages: two if len(messages) == 2 else "done")
    run(lambda: team["a"].reply("go"))
    told = team.turns[1].messages[-1].content
    assert told.count("<tool_response>") == 2 and "\n42\n" in told and "ZeroDivisionError" in told


def test_a_tool_loop_keeps_what_was_read() -> None:
    async def play() -> None:
        draft = await team["b"].reply("x")
        await team["a"].reply(f"go {draft}", reads=[draft])

    team = fake_team(
        [CALCULATING, "b"],
        lambda agent, messages: CALL if messages[-1].content.startswith("go") else "42",
    )
    run(play)
    assert [turn.reads for turn in team.turns] == [(), (0,), (0,)]


def test_unknown_tools_of_an_agent_are_refused() -> None:
    team = fake_team([AgentSpec("a", tools=("calculater",))], lambda agent, messages: "x")
    with pytest.raises(SettingError, match="did you mean 'calculator'"):
        team["a"].reply("go")
