"""Who answers at which step, who reads and rates whom, when the network ends. Numbers of the unit
facts of DyLAN (arXiv 2310.02170) worked out by hand."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from marlora.agents.patterns.temporal_network import (
    TemporalNetwork,
    completed,
    enough,
    ranking,
    ratings,
)
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.transcript import Output
from marlora.agents.types import Message, SettingError, Task
from tests.conformance import check_system

TASK = Task("t", "7+8+5", "20")
Answer = Callable[[str, tuple[Message, ...]], str]


def play(
    system: TemporalNetwork, answer: Answer, values: dict[str, Any] | None = None, seed: int = 0
) -> tuple[Output, Team]:
    team = fake_team(system.specs, answer, values, seed=seed)
    return asyncio.run(system.run(TASK.public(), team)), team


def asked(team: Team) -> list[str]:
    return [turn.agent for turn in team.turns]


def own_name(agent: str, messages: tuple[Message, ...]) -> str:
    """Nobody agrees with anybody."""
    return f"{agent} [[5, 3, 2]]"


# facts


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("[[5, 3, 2]]", [1.0, 0.6, 0.4]),
        ("so [[1,1,1]], no: [[4,4,0]]", [0.8, 0.8, 0.0]),  # the last list counts
        ("[[9,1,-2]]", [1.0, 0.2, 0.0]),
        ("[[x, 5, 2.5]]", [0.0, 1.0, 0.0]),
        ("[[5,5]]", None),
        ("[[5,5,5,5]]", None),
        ("[5,5,5]", None),
        ("", None),
    ],
)
def test_ratings(text: str, points: list[float] | None) -> None:
    assert ratings(text, 3) == points


def test_more_than_two_thirds_are_a_consensus() -> None:
    assert [enough(n) for n in (2, 3, 4, 7)] == [2, 3, 3, 5]
    assert [enough(n) for n in range(1, 40)] == [2 * n // 3 + 1 for n in range(1, 40)]
    assert enough(4, 1) == 5  # never


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("because ... [3, 1]", [2, 0]),
        ("[7,2]", [3, 1]),  # clipped
        ("[1, 2] or rather [4,3]", [3, 2]),
        ("[1,1]", [0]),  # a second one is drawn
        ("[1,2,3]", []),
        ("[1,]", []),
        ("both of them", []),
    ],
)
def test_rankings(text: str, best: list[int]) -> None:
    assert ranking(text, 4, 2) == best


def test_what_the_ranker_did_not_name_is_drawn() -> None:
    drawn = [completed([], 4, 2, random.Random(seed)) for seed in range(50)]
    assert all(len({*pair}) == 2 and max(pair) < 4 for pair in drawn)
    assert len({tuple(sorted(pair)) for pair in drawn}) == 6
    seconds = {completed([0], 4, 2, random.Random(seed))[1] for seed in range(50)}
    assert seconds == {1, 2, 3}


def test_the_agents_that_the_ranker_names_go_on_whatever_the_order_of_calls() -> None:
    """Fact 5: the authors' code compares the ranker's numbers with positions of a shuffled loop."""

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        if agent != "ranker":
            return agent
        shown = messages[-1].content.split("Solution ")[1:]
        numbers = {text[3:].strip().split()[0]: text[0] for text in shown}
        return f"[{numbers['c']}, {numbers['a']}]"

    system = TemporalNetwork([*"abcd", "ranker"], ranker="ranker", rank="{others}")
    for seed in range(12):
        _, team = play(system, answer, seed=seed)
        assert sorted(asked(team)[9:11]) == ["a", "c"] == sorted(asked(team)[11:13])
        assert asked(team)[8] == "ranker" and len(team.turns) == 13
        (operation,) = team.operations
        assert (operation.name, operation.text, operation.error) == ("ranking", "a, c", "")


# the network


def test_everybody_reads_and_rates_all_of_the_step_before() -> None:
    system = TemporalNetwork(["a", "b", "c"], steps=3)
    _, team = play(system, own_name)
    assert [sorted(asked(team)[n : n + 3]) for n in (0, 3, 6)] == [["a", "b", "c"]] * 3
    reads = [turn.reads for turn in team.turns]
    assert reads == [()] * 3 + [(0, 1, 2)] * 3 + [(3, 4, 5)] * 3
    assert all(len(turn.messages) == 1 for turn in team.turns)  # a fresh chat each time
    assert "[[" not in team.turns[3].messages[-1].content.split("Using their")[0]
    assert len(team.rewards) == 18 and {r.name for r in team.rewards} == {"rating"}
    by_rater: dict[str, list[float]] = {}
    for reward in team.rewards:
        by_rater.setdefault(reward.source, []).append(reward.value)
        assert reward.turn is not None and team.turns[reward.turn].agent == reward.agent
        assert reward.turn // 3 == int(reward.source) // 3 - 1
    assert set(by_rater) == set("345678")
    assert all(values == [1.0, 0.6, 0.4] for values in by_rater.values())


def test_ratings_go_to_the_answers_in_the_order_they_were_shown() -> None:
    points = {"a": 5, "b": 3, "c": 1}

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        shown = [text[3:].strip()[0] for text in messages[-1].content.split("Solution ")[1:]]
        return f"{agent} [[{', '.join(str(points[name]) for name in shown)}]]"

    for seed in range(5):
        _, team = play(TemporalNetwork(["a", "b", "c"], steps=2), answer, seed=seed)
        assert all(r.value == points[r.agent or ""] / 5 for r in team.rewards)
        assert len(team.rewards) == 9


def test_ratings_that_cannot_be_read_are_no_number() -> None:
    _, team = play(TemporalNetwork(["a", "b", "c"], steps=2), lambda agent, _: f"{agent} [[5, 5]]")
    assert len(team.rewards) == 9 and all(math.isnan(r.value) for r in team.rewards)
    assert {r.text for r in team.rewards} == {"no ratings could be read"}


def test_it_ends_where_more_than_two_thirds_agree_and_asks_no_more_than_it_takes() -> None:
    output, team = play(TemporalNetwork([*"abcd"]), lambda agent, _: "20")
    assert (output.text, len(team.turns)) == ("20", 3)  # of four, three may decide
    assert [turn.index for turn in output.reads] == [0, 1, 2]  # type: ignore[union-attr]
    for seed in range(8):  # three of four give one answer, the fourth may be asked first
        answers = {"a": "20", "b": "19", "c": "20", "d": "20"}
        output, team = play(TemporalNetwork([*"abcd"]), lambda a, _: answers[a], seed=seed)  # noqa: B023
        assert output.text == "20" and len(team.turns) == 3 + ("b" in asked(team)[:3])
    output, team = play(TemporalNetwork([*"abc"]), lambda a, _: "19" if a == "b" else "20")
    assert (output.text, len(team.turns)) == ("20", 12)  # of three, all must agree
    output, team = play(TemporalNetwork([*"abcd"], consensus=1, steps=2), lambda agent, _: "20")
    assert (output.text, len(team.turns)) == ("20", 8)


def test_few_agents_play_where_the_value_says_so() -> None:
    system = TemporalNetwork([*"abcd"], steps=2)
    _, team = play(system, own_name, {"team": "d, b"})
    assert {*asked(team)} == {"b", "d"} and len(team.turns) == 4
    (param,) = [param for param in system.params() if param.name == "team"]
    assert (param.value, param.kind) == ("a, b, c, d", "choice")
    assert param.problem("d, b") is None
    assert "'e' is no agent that answers" in str(param.problem("a, e"))
    assert "expected names" in str(param.problem(" , ")) and param.problem("a, a")
    ranked = TemporalNetwork([*"abc", "judge"], ranker="judge")
    assert "'judge' is no agent" in str(ranked.params()[-1].problem("a, judge"))
    with pytest.raises(SettingError, match=r"values\.team: 'e' is no agent that answers"):
        play(system, own_name, {"team": "a, e"})


def test_a_ranking_that_cannot_be_read_is_on_record() -> None:
    system = TemporalNetwork([*"abcd", "judge"], ranker="judge", steps=3)
    _, team = play(system, lambda agent, _: agent)
    (operation,) = team.operations
    assert operation.error == "2 of them drawn" and operation.reads == (8,)
    assert sorted(asked(team)[9:]) == sorted(operation.text.split(", "))
    _, team = play(system, lambda agent, _: "[2, 2]" if agent == "judge" else agent)
    assert team.operations[0].error == "1 of them drawn" and len(asked(team)[9:]) == 2


def test_of_no_more_agents_than_go_on_none_is_ranked() -> None:
    _, team = play(TemporalNetwork(["a", "b", "judge"], ranker="judge"), own_name)
    assert "judge" not in asked(team) and len(team.turns) == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"agents": [*"abc"], "steps": 3},
        {"agents": [*"abcd", "judge"], "ranker": "judge"},
        {"agents": [*"ab"], "steps": 1},
    ],
)
def test_it_can_be_trained(settings: dict[str, Any]) -> None:
    check_system(TemporalNetwork(**settings), [TASK])
    check_system(
        TemporalNetwork(**settings),
        [TASK],
        lambda agent, messages, marker: f"{marker} Answer: {agent} [[1, 2, 3]] [2, 1]",
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"agents": ["a"]}, "at least two agents besides the ranker expected, got 1"),
        ({"agents": ["a", "b"], "ranker": "b"}, "besides the ranker expected, got 1"),
        ({"agents": ["a", "b"], "ranker": "c"}, "ranker 'c' is no agent"),
        ({"agents": ["a", "b"], "steps": 0}, "steps: expected at least 1"),
        ({"agents": ["a", "b"], "rank_step": 1}, "rank_step: expected at least 2"),
        ({"agents": ["a", "b"], "update": "{other}"}, r"update: unknown field \{other\}"),
        ({"agents": ["a", "b"], "quote": "{answer}"}, r"quote: unknown field \{answer\}"),
    ],
)
def test_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        TemporalNetwork(**settings)
