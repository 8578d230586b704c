"""The transcript: replay of recorded turns and decisions."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any

import pytest

from marlora.agents.patterns.debate import Debate
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.transcript import Call, LimitError, Operation, ReplayError, Transcript
from marlora.agents.types import (
    AgentSpec,
    Completion,
    Decision,
    Message,
    Sampling,
    SettingError,
    Task,
    Turn,
    from_json,
    to_json,
)
from tests.agents.teams import run, slow_team

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


def test_a_greedy_team_takes_the_likeliest_and_the_first_of_several() -> None:
    logits = {"x": 0.0, "y": math.log(3.0), "z": math.log(3.0)}
    for seed in range(20):
        transcript = Transcript(seed)
        assert transcript.decide("model", ["x", "y", "z"], logits, greedy=True) == "y"
        assert transcript.decide("model", ["z", "x", "y"], logits, greedy=True) == "z"
        assert transcript.decide("free", ["w", "v"], {}, greedy=True) == "w"
        logprobs = [decision.logprob for decision in transcript.decisions]
        # as if they had been drawn: 3 of 1 + 3 + 3, and 1 of 2
        assert logprobs == pytest.approx([math.log(3 / 7), math.log(3 / 7), math.log(1 / 2)])


def test_a_recorded_decision_is_taken_again_in_a_greedy_team_too() -> None:
    recorded = [Decision(0, "edge", ("yes", "no"), "no", -2.0, "of another query")]
    transcript = Transcript(decisions=recorded)
    assert transcript.decide("edge", ["yes", "no"], {"yes": 2.0}, greedy=True) == "no"
    assert transcript.decisions[0].logprob == pytest.approx(-math.log(1 + math.exp(2.0)))
    assert transcript.decisions[0].about == ""


# --- operations


def test_turns_and_operations_are_numbered_together_and_may_read_one_another() -> None:
    async def play() -> None:
        drafts = [await team[name].reply("draft") for name in "ab"]
        joined = team.record("join", " ".join(map(str, drafts)), reads=drafts)
        checked = team.record("check", "", reads=[joined, drafts[0]], error="no number in it")
        last = await team["c"].reply(f"{joined} {checked}", reads=[joined, checked])
        team.record("strip", str(last), reads=[last])

    team, _ = slow_team("abc", [0] * 6)
    run(play)
    assert [(turn.index, turn.agent, turn.reads) for turn in team.turns] == [
        (0, "a", ()),
        (1, "b", ()),
        (4, "c", (2, 3)),
    ]
    assert team.operations == [
        Operation(2, "join", (0, 1), "0.0 1.0"),
        Operation(3, "check", (0, 2), "", "no number in it"),
        Operation(5, "strip", (4,), "4.0"),
    ]
    assert "0.0 1.0" in team.turns[2].messages[-1].content


def test_operations_take_their_places_in_a_replay() -> None:
    async def play(team: Team) -> str:
        first = await team["a"].reply("x")
        half = team.record("half", str(first)[:1], reads=[first])
        return str(await team["b"].reply(str(half), reads=[half]))

    team, _ = slow_team("ab", [0, 0, 0])
    output = run(lambda: play(team))
    stored = [from_json(Turn, json.loads(json.dumps(to_json(turn)))) for turn in team.turns]
    again, calls = slow_team("ab", [0, 0, 0], given=stored)
    assert run(lambda: play(again)) == output and calls == []
    assert (again.turns, again.operations) == (team.turns, team.operations)


def test_operations_count_towards_max_turns() -> None:
    transcript = Transcript(max_turns=1)
    transcript.note("one", "x")
    with pytest.raises(LimitError, match="asked for turn 1; max_turns is 1"):
        transcript.note("two", "y")


# --- alone, without a team


def test_calls_are_numbered_and_selected_without_a_team() -> None:
    transcript = Transcript(seed=3, max_turns=2)
    first, second = transcript.reserve(1), transcript.reserve(1)
    with pytest.raises(LimitError, match="turn 2; max_turns is 2"):
        transcript.reserve(1)

    async def complete(call: Call) -> list[Completion]:
        return [Completion(f"{call.index}.{k}") for k in range(call.n)]

    async def play() -> None:
        for index in (second, first):
            call = Call(index, AgentSpec("a"), (Message("user", "x"),), Sampling(), n=2)
            await transcript.record(call, complete, reads=(7,), saw_gold=index == first)

    run(play)
    assert [(t.text, t.taken, t.reads, t.saw_gold) for t in transcript.turns] == [
        ("0.0", True, (7,), True),
        ("0.1", False, (7,), True),
        ("1.0", True, (7,), False),
        ("1.1", False, (7,), False),
    ]
    transcript.select(transcript.siblings(transcript.turns[0])[1])
    assert [t.taken for t in transcript.siblings(transcript.turns[0])] == [False, True]


def test_a_replacement_comes_before_a_recorded_turn() -> None:
    recorded = Turn(0, "a", (Message("user", "x"),), text="old")
    call = Call(0, AgentSpec("a"), recorded.messages, Sampling())

    async def nothing(call: Call) -> list[Completion]:
        raise AssertionError("nothing is sampled in a replay")

    again = Transcript(given=[recorded])
    assert run(lambda: again.record(call, nothing)).text == "old"
    changed = Transcript(given=[recorded], replace={0: Completion("new")})
    turn = run(lambda: changed.record(call, nothing))
    assert (turn.text, turn.source) == ("new", "written")
