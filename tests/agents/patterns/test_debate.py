"""A debate whose critics go on for its generators, and one that is summed up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.patterns.debate import Debate
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Message, SettingError, Task
from tests.conformance import check_system

TASK = Task("t", "7+8+5")
SIX = ["g1", "g2", "g3", "c1", "c2", "c3"]


def play(system: Debate, answers: list[str]) -> tuple[str, Team]:
    given = iter(answers)
    team = fake_team(system.specs, lambda agent, messages: next(given))
    return asyncio.run(system.run(TASK.public(), team)), team


def test_a_critic_goes_on_where_its_generator_stood() -> None:
    agents = [AgentSpec(name, prompt=f"You are {name}.") for name in SIX]
    output, team = play(
        Debate(agents, critics=True, rounds=3), ["8", "3", "5", "8", "8", "5", "8", "8", "8"]
    )
    assert output == "8"
    assert [turn.agent for turn in team.turns] == [
        "g1",
        "g2",
        "g3",
        "c1",
        "c2",
        "c3",
        "c1",
        "c2",
        "c3",
    ]
    critic = team.turns[4].messages
    assert critic[:3] == (
        Message("system", "You are c2."),
        Message("user", "7+8+5"),
        Message("assistant", "3"),
    )
    assert "[g1] 8\n\n[g3] 5" in critic[3].content and "[g2]" not in critic[3].content
    later = team.turns[7].messages
    assert (
        later[:5] == (*critic, Message("assistant", "8")) and "[c1] 8\n\n[c3] 5" in later[5].content
    )
    assert [turn.reads for turn in team.turns[3:6]] == [
        (0, 1, 2)
    ] * 3  # its generator's own answer stands in its chat
    assert team.turns[7].reads == (0, 1, 2, 3, 5)


def test_the_summary_stands_in_place_of_the_others_words() -> None:
    system = Debate(
        ["a", "b", AgentSpec("sum", policy="base")], summariser="sum", revise="{others} ({prompt})"
    )
    output, team = play(system, ["4", "5", "b says five", "a says four", "5", "5"])
    assert output == "5" and system.seats == [("a", "a"), ("b", "b")]
    assert [turn.agent for turn in team.turns] == ["a", "b", "sum", "sum", "a", "b"]
    assert (
        "[b] 5" in team.turns[2].messages[-1].content
        and "[a]" not in team.turns[2].messages[-1].content
    )
    assert team.turns[4].messages[-1].content == "b says five (7+8+5)"
    assert [turn.reads for turn in team.turns] == [(), (), (1,), (0,), (2,), (3,)]


@pytest.mark.parametrize(
    "system",
    [
        Debate(SIX, critics=True),
        Debate(SIX, critics=True, rounds=3, revise="{others}"),
        Debate([*SIX, "sum"], critics=True, summariser="sum"),
    ],
)
def test_debates_conform(system: Debate) -> None:
    check_system(system, [Task("sum", "What is 7+8+5?", answer="the answer is twenty")])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"agents": SIX[:5], "critics": True},
            "as many generators as critics and rounds >= 2 expected, got 5 agents",
        ),
        ({"agents": SIX, "critics": True, "rounds": 1}, "rounds >= 2 expected"),
        ({"agents": ["g", "c"], "critics": True}, "at least two agents"),
        (
            {"agents": ["a", "b", "c"], "summariser": "d"},
            "summariser 'd' is no agent; known: 'a', 'b', 'c'",
        ),
        ({"agents": ["a", "b"], "summariser": "b"}, "at least two agents"),
        (
            {"agents": ["a", "b"], "revise": "{other}"},
            r"revise: unknown field \{other\}; did you mean 'others'\?",
        ),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Debate(**arguments)
