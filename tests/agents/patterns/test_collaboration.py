"""Who sits where, who reads what, what a verifier's words look like, and when a collaboration
ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.patterns.collaboration import Collaboration
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.tools.verifiers import calculator, in_words, resolve_verifier, verify
from marlora.agents.types import AgentSpec, SettingError, Task
from tests.conformance import check_system

TASK = Task("t", "7+8+5", "20")
SHORT: dict[str, Any] = {
    "quote": "{answer}{verdict}",
    "revise": "{verdict}{others}",
    "verdict": "{words}",
    "words": ["-", "-", "+", "+"],
}


def play(system: Collaboration, answers: list[str], task: Task = TASK) -> tuple[str, Team]:
    given = iter(answers)
    team = fake_team(system.specs, lambda agent, messages: next(given))
    return asyncio.run(system.run(task.public(), team)), team


def told(team: Team) -> list[tuple[str, str]]:
    return [(turn.agent, turn.messages[-1].content) for turn in team.turns]


def ten_digits(task: Task, text: str) -> float:
    """A verifier that knows nothing."""
    return sum(map(ord, text)) % 11 / 10


@pytest.mark.parametrize("separation", ["single", "collaboration", "turn"])
@pytest.mark.parametrize("verifier", ["", f"{__name__}:ten_digits"])
def test_it_can_be_trained(separation, verifier):
    for members, rounds in ((["a", "b"], 3), (["a", "b", "c"], 2), (["a"], 2)):
        check_system(
            Collaboration(members, rounds=rounds, separation=separation, verifier=verifier), [TASK]
        )


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_it_can_be_trained_when_it_may_end_early(share):
    check_system(
        Collaboration(["a", "b", "c"], rounds=3, stop_share=share),
        [TASK],
        lambda agent, messages, marker: f"{marker} Answer: 4",
    )


def test_seats_and_their_policies():
    members = [AgentSpec("a", policy="small", prompt="p"), "b"]
    assert [s.name for s in Collaboration(members).specs] == ["a", "b"]
    split = Collaboration(members, separation="collaboration", rounds=3)
    assert [(s.name, s.policy, s.prompt) for s in split.specs] == [
        ("a-alone", "small-alone", "p"),
        ("b-alone", "b-alone", ""),
        ("a-together", "small-together", "p"),
        ("b-together", "b-together", ""),
    ]
    assert split.members == ["a", "b"] and split.member_of["b-together"] == "b"
    assert [split.seat("a", number) for number in range(3)] == [
        "a-alone",
        "a-together",
        "a-together",
    ]
    assert [s.name for s in Collaboration(["a"], separation="turn", rounds=3).specs] == [
        "a-1",
        "a-2",
        "a-3",
    ]
    assert split.with_agents(split.specs) == split  # seats stay seats
    assert {
        s.policy for s in Collaboration([AgentSpec("a", policy="base")], separation="turn").specs
    } == {"base"}


def test_a_seat_takes_the_chat_over():
    output, team = play(
        Collaboration(["a", "b"], rounds=3, separation="turn", **SHORT),
        ["19", "20", "20", "19", "20", "20"],
    )
    assert output == "20"
    assert told(team) == [
        ("a-1", "7+8+5"),
        ("b-1", "7+8+5"),
        ("a-2", "20"),
        ("b-2", "19"),
        ("a-3", "19"),
        ("b-3", "20"),
    ]
    assert [m.content for m in team.turns[4].messages] == ["7+8+5", "19", "20", "20", "19"]
    assert [turn.reads for turn in team.turns] == [
        (),
        (),
        (0, 1),
        (0, 1),
        (0, 1, 2, 3),
        (0, 1, 2, 3),
    ]


def test_the_verifiers_words_are_shown():
    _, team = play(
        Collaboration(["a", "b"], verifier="calculator", **SHORT), ["19", "20", "20", "20"]
    )
    assert told(team)[2:] == [("a", "-20+"), ("b", "+19-")]
    _, team = play(Collaboration(["a", "b"], verifier="calculator"), ["19", "20", "20", "20"])
    shown = told(team)[2][1]
    assert (
        "[b] (a verifier says: most likely right, 1.00)\n20" in shown
        and "own (a verifier says: almost certainly wrong, 0.00)" in shown
    )
    _, team = play(Collaboration(["a", "b"]), ["19", "20", "20", "20"])
    assert "verifier" not in told(team)[2][1]


def test_words_of_scores():
    assert [
        in_words(score, "abcd") for score in (0.0, 0.29, 0.3, 0.59, 0.6, 0.79, 0.8, 1.0)
    ] == list("aabbccdd")


def test_a_majority_ends_the_debate():
    answers = ["4", "4", "5", *["6"] * 6]
    _, team = play(Collaboration(["a", "b", "c"], rounds=3, stop_share=0.6), answers)
    assert len(team.turns) == 3
    _, team = play(Collaboration(["a", "b", "c"], rounds=3, stop_share=0.7), answers)
    assert len(team.turns) == 6  # 2 of 3 were not enough, then all agreed
    right = Task("t", "2+2", "4")
    for stop_score, rounds in ((0.5, 1), (1.0, 3)):
        system = Collaboration(
            ["a", "b", "c"], rounds=3, verifier="calculator", stop_share=0.6, stop_score=stop_score
        )
        assert len(play(system, ["4", "4", "5", *["4"] * 6], right)[1].turns) == 3 * rounds


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"separation": "turns"}, "separation: expected one of .*'turns'; did you mean 'turn'"),
        ({"words": ["a", "b"]}, "words: expected four"),
        ({"quote": "{txt}"}, r"quote: unknown field \{txt\}"),
        ({"quote": "{member}"}, "quote: expected"),
        ({"revise": "{other}"}, r"revise: unknown field \{other\}"),
        ({"agents": [AgentSpec("a", tools=("calculator",))]}, "agents.a.tools"),
    ],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(SettingError, match=match):
        Collaboration(**{"agents": ["a", "b"], **settings})


def test_a_verifier_never_sees_the_gold_answer():
    seen: list[Task] = []

    def spy(task: Task, text: str) -> float:
        seen.append(task)
        return 0.5

    secret = Task("t", "7+8+5", "20", meta={"_hidden": 1, "c": 5})
    assert asyncio.run(verify(spy, secret, "20")) == 0.5
    assert seen[0].answer is None and dict(seen[0].meta) == {"c": 5}


def test_the_calculator_reads_the_prompt():
    for prompt, text, score in (
        ("7+8+5", "20", 1),
        ("What is (2 + 3) * 4?", "Answer: 20", 1),
        ("7+8", "5", 0),
        ("1,000-1", "999", 1),
    ):
        assert calculator(Task("t", prompt), text) == score
    with pytest.raises(ValueError, match="holds no arithmetic expression"):
        calculator(Task("t", "Who wrote it?"), "5")
    with pytest.raises(ValueError, match="cannot work out"):
        calculator(Task("t", "7/0"), "5")


def test_scores_are_shares():
    with pytest.raises(ValueError, match=r"gave 1\.5"):
        asyncio.run(verify(lambda task, text: 1.5, TASK, "20"))
    with pytest.raises(
        SettingError, match="verifier 'calculatr': no such verifier; did you mean 'calculator'"
    ):
        resolve_verifier("calculatr")
