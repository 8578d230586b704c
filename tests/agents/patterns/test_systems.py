"""What the shipped systems say to whom, and what they make of the answers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from marlora.agents.patterns.actor_critic import ActorCritic, verdict
from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.debate import Debate
from marlora.agents.patterns.vote import Vote
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task

TASK = Task("t", "7+8+5", meta={"c": 5})


def play(
    system: System, answers: list[str] | Any, task: Task = TASK, seed: int = 0
) -> tuple[str, Team]:
    """Output and team; answers are given in the order they are asked for."""
    given = iter(answers)
    team = fake_team(system.specs, lambda agent, messages: next(given), seed=seed)
    return asyncio.run(system.run(task.public(), team)), team


def said(team: Team) -> list[tuple[str, str]]:
    """(agent, what it was told last) of each turn."""
    return [(turn.agent, turn.messages[-1].content) for turn in team.turns]


def test_debate_takes_the_majority_and_everyone_sees_the_dissent() -> None:
    output, team = play(Debate(["a", "b", "c"], rounds=2), ["4", "4", "5", "4", "4", "4"])
    assert output == "4"
    assert "[c] 5" in team.turns[3].messages[-1].content
    assert "[a]" not in team.turns[3].messages[-1].content  # its own draft stands in its chat
    assert team.turns[3].messages[:2] == (Message("user", "7+8+5"), Message("assistant", "4"))
    assert [turn.reads for turn in team.turns] == [(), (), (), (1, 2), (0, 2), (0, 1)]


def test_reads_cover_the_whole_chat() -> None:
    _, team = play(Debate(["a", "b"], rounds=3), ["1", "2", "3", "4", "5", "6"])
    assert [turn.reads for turn in team.turns] == [(), (), (1,), (0,), (1, 3), (0, 2)]


def test_an_even_team_breaks_ties_by_seed() -> None:
    system = Debate(["a", "b"], rounds=1)
    outputs = [play(system, ["4", "5"], seed=seed)[0] for seed in range(40)]
    assert outputs == [play(system, ["4", "5"], seed=seed)[0] for seed in range(40)]
    assert min(Counter(outputs).values()) >= 8 and set(outputs) == {"4", "5"}


def test_debate_needs_two_agents_and_a_round() -> None:
    with pytest.raises(SettingError, match="at least two agents expected, got 1"):
        Debate(["a"])
    with pytest.raises(SettingError, match="rounds: expected at least 1, got 0"):
        Debate(["a", "b"], rounds=0)


def test_chain_by_default_shows_task_and_previous_text() -> None:
    output, team = play(Chain(["solver", "reviewer"]), ["twenty-one", "no: 20"])
    assert output == "no: 20"
    assert said(team)[0] == ("solver", "7+8+5")
    assert said(team)[1] == (
        "reviewer",
        "7+8+5\n\nsolver wrote:\ntwenty-one\n\nGo on from this and answer the task.",
    )
    assert [turn.reads for turn in team.turns] == [(), (0,)]


def test_chain_views_hide_what_an_agent_need_not_see() -> None:
    output, team = play(Chain(["first", "last"], views={"last": "{previous}+{c}"}), ["15", "20"])
    assert (output, said(team)) == ("20", [("first", "7+8+5"), ("last", "15+5")])


def test_chain_fields() -> None:
    views = {"z": "{x}|{previous}|{answer}|{prompt}|{{c}}|{ c }"}
    _, team = play(Chain(["x", "y", "z"], views=views), ["one", "so \\boxed{2} then", "3"])
    assert said(team)[2][1] == "one|so \\boxed{2} then|2|7+8+5|{c}|5"
    assert team.turns[2].reads == (0, 1)
    _, team = play(Chain(["x", "y"], views={"y": "<{answer}>"}), [" no number ", ""])
    assert said(team)[1][1] == "<no number>"


def test_chain_never_reads_model_text_as_a_template() -> None:
    forged = "{prompt} {c} {{x}} {0.__class__} {unknown}"
    _, team = play(
        Chain(["x", "y"], views={"y": "{previous}+{prompt}"}),
        [forged, ""],
        Task("t", "{x}", meta={"c": 1}),
    )
    assert said(team)[1][1] == f"{forged}+{{x}}"
    _, team = play(Chain(["x", "y"]), [forged, ""])
    assert forged in said(team)[1][1]


@pytest.mark.parametrize(
    ("views", "problem"),
    [
        ({"lst": "{previous}"}, r"views.lst: no such agent in the chain; did you mean 'last'\?"),
        ({"last": "{previous"}, r"views.last: unpaired '\{'"),
        ({"last": 5}, "views.last: expected a template"),
        ({"first": "{previous}"}, r"views.first: \{previous\} has not been said"),
        ({"first": "{last}"}, r"views.first: \{last\} has not been said"),
        ({"last": "{last}"}, r"views.last: \{last\} has not been said"),
    ],
)
def test_chain_refuses_wrong_views(views: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Chain(["first", "last"], views=views)


def test_chain_names_the_nearest_field() -> None:
    with pytest.raises(
        SettingError,
        match=r"views.last: unknown field \{prevous\} for task 't'; did you mean 'previous'\?",
    ):
        play(Chain(["first", "last"], views={"last": "{prevous}"}), ["1", "2"])
    private = Task("t", "x", meta={"_tests": "hidden"})
    with pytest.raises(SettingError, match=r"unknown field \{_tests\}"):
        play(Chain(["first", "last"], views={"last": "{_tests}"}), ["1", "2"], private)


def test_the_critic_speaks_only_if_the_judge_says_wrong() -> None:
    team_of_three = ActorCritic(["actor", "judge", "critic"], max_rounds=2)
    output, team = play(
        team_of_three, ["19", "Hm.\nVerdict: wrong", "you lost one", "20", "Verdict: right"]
    )
    assert output == "20"
    assert [turn.agent for turn in team.turns] == ["actor", "judge", "critic", "actor", "judge"]
    assert [turn.reads for turn in team.turns] == [(), (0,), (0,), (2,), (3,)]
    assert "you lost one" in said(team)[3][1] and "Hm." not in said(team)[3][1]
    assert said(team)[4][1].startswith("7+8+5\n\nAn answer to this:\n20\n")
    assert len(team.turns[4].messages) == 1  # a fresh chat each round
    output, team = play(team_of_three, ["20", "Verdict: right"])
    assert (output, len(team.turns)) == ("20", 2)


def test_of_two_the_judge_is_the_critic() -> None:
    output, team = play(
        ActorCritic(["actor", "judge"], max_rounds=1), ["19", "lost one. Verdict: wrong", "20"]
    )
    assert (output, [turn.reads for turn in team.turns]) == ("20", [(), (0,), (1,)])
    assert "lost one" in said(team)[2][1]


def test_rounds_are_bounded_and_an_unreadable_verdict_lets_the_answer_stand() -> None:
    output, team = play(
        ActorCritic(["actor", "judge"], max_rounds=3), ["1", *["Verdict: wrong", "2"] * 3]
    )
    assert (output, len(team.turns)) == ("2", 7)
    output, team = play(ActorCritic(["actor", "judge"]), ["1", "who knows"])
    assert (output, len(team.turns)) == ("1", 2)


def test_texts_with_braces_pass_through_the_judge() -> None:
    output, team = play(
        ActorCritic(["actor", "judge"], max_rounds=1),
        ["{prompt}", "{answer} Verdict: wrong", "{feedback}"],
    )
    assert (
        output == "{feedback}"
        and "{answer} Verdict" in said(team)[2][1]
        and "\n{prompt}\n" in said(team)[1][1]
    )


@pytest.mark.parametrize(
    ("text", "judged"),
    [
        ("Verdict: right", True),
        ("VERDICT: **wrong**.", False),
        ("I first thought Verdict: right, but\nVerdict: wrong", False),
        ("right", True),
        ("**Wrong.**", False),
        ("The left one is right.", None),
        ("Verdict: rightly so", None),
        ("Verdict:", None),
        ("", None),
    ],
)
def test_verdicts(text: str, judged: bool | None) -> None:
    assert verdict(text) is judged


def test_actor_critic_settings() -> None:
    for settings, problem in (
        ({"agents": ["a"]}, "two or three agents"),
        ({"agents": ["a", "b"], "max_rounds": 0}, "max_rounds: expected at least 1"),
    ):
        with pytest.raises(SettingError, match=problem):
            ActorCritic(**settings)


def test_vote_asks_each_sample_in_a_chat_of_its_own() -> None:
    output, team = play(Vote(["a", "b"], samples=2), ["Answer: 7", "8", "8", "7.0"], seed=3)
    assert [turn.agent for turn in team.turns] == ["a", "a", "b", "b"]
    assert all(
        turn.taken and turn.messages == (Message("user", "7+8+5"),) and not turn.reads
        for turn in team.turns
    )
    assert len({turn.sampling.seed for turn in team.turns}) == 4
    assert output in ("7", "8")
    assert play(Vote(["a"], samples=3), ["x y z and more words", "9", "Answer: 9"])[0] == "9"
    with pytest.raises(SettingError, match="samples: expected at least 1"):
        Vote(["a"], samples=0)


def test_nobody_answers() -> None:
    rambling = "I would rather not say anything about that"
    assert play(Vote(["a", "b"]), [rambling, ""])[0] == ""


@pytest.mark.parametrize(
    "system",
    [Chain(["a", "b"], views={"b": "{a}"}), Debate(["a", "b"], rounds=3), Vote(["a"], samples=2)],
    ids=repr,
)
def test_settings_rebuild_a_system(system: System) -> None:
    assert type(system)(agents=system.agents, **system.arguments()) == system


def test_a_random_chain_of_views_is_stable() -> None:
    # Property: whatever agents say, the last one is told exactly the parts its view names, in
    # order.
    rng = random.Random(0)
    for _ in range(50):
        texts = ["".join(rng.choices("{}ab \n%$\\", k=rng.randrange(12))) for _ in range(3)]
        _, team = play(Chain(["x", "y", "z"], views={"z": "{y}/{x}"}), texts)
        assert said(team)[2][1] == f"{texts[1]}/{texts[0]}"
