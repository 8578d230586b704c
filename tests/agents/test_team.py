"""The team: numbers given before anything is awaited, chats, siblings, replay, decisions, tools,
limits."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest

from marlora.agents.chat import Agent, Services
from marlora.agents.concurrency import gather
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.seeds import derive_seed
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.transcript import Transcript
from marlora.agents.types import (
    AgentSpec,
    Call,
    Completion,
    Decision,
    LimitError,
    Message,
    ReplayError,
    Sampling,
    SettingError,
    Task,
    Turn,
    from_json,
    to_json,
)

T = TypeVar("T")


def run(play: Callable[[], Awaitable[T]]) -> T:
    async def inside() -> T:
        return await play()

    return asyncio.run(inside())


def slow_team(names: str, waits: Sequence[int], **settings: Any) -> tuple[Team, list[Call]]:
    """A team whose k-th call is answered `k` after waits[k] turns of the event loop. Also: the
    calls, as they arrive."""
    calls: list[Call] = []

    async def ask(call: Call) -> list[Completion]:
        calls.append(call)
        for _ in range(waits[call.index]):
            await asyncio.sleep(0)
        return [Completion(f"{call.index}.{k}") for k in range(call.n)]

    specs = [AgentSpec(name) for name in names]
    return Team(specs, Services(ask), Transcript(**settings)), calls


# --- numbers and seeds


def test_index_is_the_order_of_calls_whatever_the_latency() -> None:
    def indices(waits: list[int]) -> list[tuple[int, str, int | None]]:
        team, _ = slow_team("abc", waits)
        run(lambda: gather(agent.reply("hi") for agent in team))
        return [(turn.index, turn.agent, turn.sampling.seed) for turn in team.turns]

    assert indices([9, 5, 1]) == indices([1, 5, 9])
    assert [(index, agent) for index, agent, _ in indices([9, 5, 1])] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
    ]


def test_index_is_taken_before_the_reply_is_awaited() -> None:
    async def play() -> list[int]:
        first, second = team["a"].reply("x"), team["b"].reply("y")
        return [(await second).index, (await first).index]

    team, _ = slow_team("ab", [0, 0])
    assert run(play) == [1, 0]


def test_every_request_has_a_seed_of_its_own() -> None:
    async def seeds(seed: int) -> list[int | None]:
        team = fake_team(["a", "b"], lambda agent, messages: "x", seed=seed)
        for _ in range(20):
            await gather(agent.reply("hi") for agent in team)
        return [turn.sampling.seed for turn in team.turns]

    found = [seed for episode in range(20) for seed in asyncio.run(seeds(episode))]
    assert len(set(found)) == len(found) == 800
    assert asyncio.run(seeds(3)) == found[120:160]
    # Siblings draw with the numbers that follow their request's seed: these must not meet another
    # request's.
    gaps = sorted(found)
    assert min(b - a for a, b in zip(gaps, gaps[1:], strict=False)) > 1000


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    assert (
        derive_seed(0, "solver", 3) == 1720351317042732501
    )  # printf '[0, "solver", 3]' | sha256sum
    assert derive_seed("a", "b") != derive_seed("ab") and 0 <= derive_seed() < 2**62


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


# --- gather


def test_gather_keeps_order() -> None:
    async def value(k: int) -> int:
        for _ in range(5 - k):
            await asyncio.sleep(0)
        return k

    assert run(lambda: gather(value(k) for k in range(5))) == [0, 1, 2, 3, 4]
    assert run(lambda: gather([])) == []


def test_gather_cancels_siblings_and_raises_the_first_error() -> None:
    cancelled: list[int] = []

    async def work(k: int) -> int:
        try:
            if k == 1:
                await asyncio.sleep(0)
                raise ValueError("one broke")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(k)
            raise
        return k

    with pytest.raises(ValueError, match="one broke"):
        run(lambda: gather(work(k) for k in range(3)))
    assert cancelled == [0, 2]


def test_gather_cancels_what_began_if_the_iterable_fails_or_it_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    async def play() -> None:
        (outer,) = [asyncio.ensure_future(gather(work() for _ in range(2)))]
        for _ in range(3):
            await asyncio.sleep(0)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        assert ended == ["ended", "ended"]
        team, _ = slow_team("ab", [50, 50])
        with pytest.raises(SettingError, match="no such agent"):
            await gather(team[name].reply("x") for name in ("a", "bb"))
        assert len(asyncio.all_tasks()) == 1

    run(play)


# --- replay


DEBATE = Debate(["a", "b", "c"], rounds=2)
TASK = Task("t", "2+2?")


def debate(answers: str, **settings: Any) -> tuple[str, Team]:
    given = iter(answers)
    team = fake_team(DEBATE.specs, lambda agent, messages: next(given), **settings)
    return asyncio.run(DEBATE.run(TASK, team)), team


def test_all_turns_given_reproduce_the_episode_without_a_call() -> None:
    output, team = debate("445544")
    stored = [from_json(Turn, json.loads(json.dumps(to_json(turn)))) for turn in team.turns]
    again, replayed = debate("", given=stored)
    assert (again, replayed.turns) == (output, team.turns)


def test_some_turns_given_and_the_rest_live() -> None:
    _, team = debate("445544")
    output, replayed = debate("999", given=team.turns[:3])
    assert output == "9" and replayed.turns[:3] == team.turns[:3]
    assert [turn.text for turn in replayed.turns[3:]] == ["9"] * 3
    assert [turn.sampling for turn in replayed.turns] == [turn.sampling for turn in team.turns]


def test_replace_answers_instead_and_the_rest_follows() -> None:
    _, team = debate("445544")
    _, replayed = debate("777", given=team.turns[:3], replace={1: Completion("8")})
    assert [(t.text, t.source) for t in replayed.turns[:3]] == [
        ("4", "sampled"),
        ("8", "written"),
        ("5", "sampled"),
    ]
    assert "[b] 8" in replayed.turns[3].messages[-1].content
    _, replayed = debate("77777", replace={0: Completion("8", token_ids=(8,), logprobs=(0.0,))})
    assert replayed.turns[0].source == "sampled"


def test_a_diverging_system_is_noticed() -> None:
    _, team = debate("445544")
    with pytest.raises(
        ReplayError,
        match=r"turn 3: the system now asks 'a' something else .* before the first change",
    ):
        debate("", given=team.turns, replace={1: Completion("8")})
    other = fake_team(["b", "a"], lambda agent, messages: "x", given=team.turns)
    with pytest.raises(ReplayError, match="turn 0: the system now asks 'b'"):
        run(lambda: other["b"].reply("2+2?"))


def test_siblings_are_replayed_and_chosen_again() -> None:
    team, _ = slow_team("a", [0])
    run(lambda: team["a"].reply("x", n=3, choose=lambda turns: 2))
    replayed, calls = slow_team("a", [0], given=team.turns)
    assert run(lambda: replayed["a"].reply("x", n=3, choose=lambda turns: 2)).text == "0.2"
    assert replayed.turns == team.turns and calls == []
    changed, _ = slow_team("a", [0], given=team.turns)
    with pytest.raises(
        ReplayError, match="turn 0: the system now asks for 2 answers, the recording has 3"
    ):
        run(lambda: changed["a"].reply("x", n=2))


# --- decisions


def test_decisions_follow_their_logits() -> None:
    values = {"edge": {"yes": math.log(3.0)}}  # against "no" at 0: three to one
    picks = []
    for seed in range(400):
        team = fake_team(["a"], lambda agent, messages: "", seed=seed, values=values)
        picks.append(team.decide("edge", ["yes", "no"]))
        assert team.decisions[0].logprob == pytest.approx(
            math.log(0.75 if picks[-1] == "yes" else 0.25)
        )
    assert 265 <= Counter(picks)["yes"] <= 335  # 300, 4 standard deviations
    team = fake_team(["a"], lambda agent, messages: "")
    team.decide("free", ["x", "y", "z", "w"])
    assert team.decisions[0].logprob == pytest.approx(math.log(0.25))


def test_large_logits_do_not_overflow() -> None:
    team = fake_team(
        ["a"], lambda agent, messages: "", values={"edge": {"yes": 5000.0, "no": -5000.0}}
    )
    assert team.decide("edge", ["no", "yes"]) == "yes" and team.decisions[0].logprob == 0.0


def test_decisions_are_replayed() -> None:
    recorded = [
        Decision(0, "edge", ("yes", "no"), "no", 0.0),
        Decision(1, "edge", ("yes", "no"), "yes", 0.0),
    ]
    for seed in range(10):
        team = fake_team(["a"], lambda agent, messages: "", seed=seed, decisions=recorded)
        assert [team.decide("edge", ["yes", "no"]) for _ in recorded] == ["no", "yes"]
    team = fake_team(["a"], lambda agent, messages: "", decisions=recorded)
    with pytest.raises(ReplayError, match="decision 0: the system now decides 'model'"):
        team.decide("model", ["yes", "no"])
    with pytest.raises(SettingError, match="at least one option"):
        fake_team(["a"], lambda agent, messages: "").decide("edge", [])


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


# --- limits and names


def test_turns_are_limited() -> None:
    async def play() -> None:
        for _ in range(4):
            await team["a"].reply("x")

    team = fake_team(["a"], lambda agent, messages: "y", max_turns=3)
    with pytest.raises(LimitError, match="asked for turn 3; max_turns is 3"):
        run(play)
    assert len(team.turns) == 3


def test_names_of_agents() -> None:
    with pytest.raises(SettingError, match="two agents are named 'a'"):
        Chain(["a", "b", "a"])
    with pytest.raises(SettingError, match="at least one agent"):
        Chain([])
    for one in ("solver", AgentSpec("solver")):
        with pytest.raises(SettingError, match="expected a list of agents, got one"):
            Chain(one)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"agents.promt: unknown field; did you mean 'prompt'\?"):
        Chain([{"name": "a", "promt": "x"}])  # type: ignore[list-item]
    assert Chain([{"name": "a", "prompt": "x"}, "b"]).specs == (
        AgentSpec("a", prompt="x"),
        AgentSpec("b"),
    )  # type: ignore[list-item]
    with pytest.raises(
        SettingError, match=r"team\['solvr'\]: no such agent; did you mean 'solver'\?"
    ):
        fake_team(["solver"], lambda agent, messages: "")["solvr"]


def test_two_agents_may_share_a_policy() -> None:
    team = fake_team(
        [AgentSpec("a", policy="p"), AgentSpec("b", policy="p")], lambda agent, messages: agent
    )
    run(lambda: gather(agent.reply("x") for agent in team))
    assert [(turn.agent, turn.policy, turn.text) for turn in team.turns] == [
        ("a", "p", "a"),
        ("b", "p", "b"),
    ]
    assert len(team) == 2 and [agent.name for agent in team] == ["a", "b"]


def test_gold_is_marked() -> None:
    team = fake_team(["a"], lambda agent, messages: "x")
    assert run(lambda: team["a"].reply("the answer is 4", saw_gold=True)).saw_gold
    assert run(lambda: team["a"].reply("and now?")).saw_gold  # it still stands in the chat
    assert not run(lambda: team["a"].fresh().reply("x")).saw_gold


def test_team_rng_follows_the_seed() -> None:
    draws = [
        fake_team(["a"], lambda agent, messages: "", seed=seed).rng.random() for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_children_need_someone_who_plays_them() -> None:
    team = fake_team(["a"], lambda agent, messages: "")
    with pytest.raises(SettingError, match=r"use rollouts\.episodes\.runner\.EpisodeRunner"):
        run(lambda: team.play(DEBATE, [TASK]))


def test_a_system_without_run_says_so() -> None:
    class Empty(System):
        pass

    with pytest.raises(TypeError, match=r"Empty has no run\(task, team\)"):
        run(lambda: Empty(["a"]).run(TASK, fake_team(["a"], lambda agent, messages: "")))
