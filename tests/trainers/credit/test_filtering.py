"""Which turns are imitated: every rule and bound on hand-made episodes, with the table of what was
kept and dropped."""

from __future__ import annotations

import math
from typing import Any

import pytest

from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.filtering import SelectionConfig, filter_turns
from marlora.trainers.credit.leakage import (
    answer_spellings,
    contains_answer,
    leaks_answer,
    saw_answer,
)

TASK = Task("t", "What is 7+8+5?", "20", meta={"c": 5, "_steps": [15, 20]})


def turn(index: int, agent: str, text: str, *said: str, **fields: Any) -> Turn:
    messages = tuple(Message("user", one) for one in said or ("go",))
    return Turn(
        index, agent, messages, text=text, prompt_ids=(3, index), token_ids=(7, 1), **fields
    )


def episode(
    name: str,
    *turns: Turn,
    team: float | None = 1.0,
    rewards: tuple[Reward, ...] = (),
    **fields: Any,
) -> Episode:
    own = () if team is None else (Reward("exact", team),)
    return Episode(
        name,
        fields.pop("group", name),
        fields.pop("task", TASK),
        turns=turns,
        rewards=(*own, *rewards),
        **fields,
    )


def pair(name: str, team: float, **fields: Any) -> Episode:
    return episode(name, turn(0, "a", f"{name}a"), turn(1, "b", f"{name}b"), team=team, **fields)


def kept(episodes: list[Episode], **settings: Any) -> list[tuple[str, int, int]]:
    return [k.key for k in filter_turns(episodes, SelectionConfig(**settings)).kept]


def test_success_keeps_the_turns_of_correct_episodes_and_says_why() -> None:
    found = filter_turns(
        [pair("e", 1.0), pair("f", 0.0), pair("g", math.nan), pair("h", 1.0, error="broke")],
        SelectionConfig(),
    )
    assert found.weights == {("e", 0, 0): 1.0, ("e", 1, 0): 1.0}
    dropped = {"failed episode": 1, "no score": 1, "no success": 1}
    assert found.table() == {agent: {"kept": {"success": 1}, "dropped": dropped} for agent in "ab"}
    assert (
        str(found).splitlines()[0]
        == "a: kept 1 success; dropped 1 failed episode, 1 no score, 1 no success"
    )


def test_the_threshold_is_explicit() -> None:
    episodes = [pair("e", 0.4), pair("f", 0.5), pair("g", 0.9)]
    assert kept(episodes, success_threshold=0.5) == [
        ("f", 0, 0),
        ("f", 1, 0),
        ("g", 0, 0),
        ("g", 1, 0),
    ]
    assert kept(episodes) == []


def test_an_agents_own_reward_counts_before_the_teams_and_a_turns_before_both() -> None:
    """A game: `a` won, `b` lost, and of `a`'s two turns the second was worthless."""
    won = (
        Reward("won", 1.0, agent="a"),
        Reward("won", 0.0, agent="b"),
        Reward("move", 0.0, agent="a", turn=2),
    )
    game = episode(
        "e", turn(0, "a", "x"), turn(1, "b", "y"), turn(2, "a", "z"), team=None, rewards=won
    )
    assert kept([game]) == [("e", 0, 0)]
    assert kept([game], reward_weights={"won": 1.0}) == [("e", 0, 0), ("e", 2, 0)]
    assert kept([game], success_threshold=0.0) == [("e", 0, 0), ("e", 1, 0), ("e", 2, 0)]


def test_agreement_is_with_the_teams_output_and_never_reads_the_answer() -> None:
    task = Task("t", "?", "8")
    one = episode(
        "e",
        turn(0, "a", "It is 5"),
        turn(1, "b", r"\boxed{8}"),
        turn(2, "c", "5.0"),
        task=task,
        output="5",
    )
    assert kept([one], select="agreement") == [("e", 0, 0), ("e", 2, 0)]
    assert kept([episode("f", turn(0, "a", "5"), task=task, output="")], select="agreement") == []


def test_random_turns_are_drawn_by_seed_and_share() -> None:
    episodes = [pair(f"e{i}", float(i % 2)) for i in range(200)]
    half = filter_turns(episodes, SelectionConfig(select="random"))
    assert 150 < len(half.kept) < 250
    assert half.weights == filter_turns(episodes, SelectionConfig(select="random")).weights
    assert half.weights != filter_turns(episodes, SelectionConfig(select="random"), seed=1).weights
    assert (
        len(kept(episodes, select="random", keep_share=1.0))
        == len(kept(episodes, select="all"))
        == 400
    )


def test_first_and_last_turn_of_those_that_are_kept() -> None:
    talk = episode(
        "e", turn(0, "a", "x"), turn(1, "b", "y"), turn(2, "a", "z"), turn(3, "a", "w", taken=False)
    )
    assert kept([talk], turns="first") == [("e", 0, 0), ("e", 1, 0)]
    last = filter_turns([talk], SelectionConfig(turns="last"))
    assert [k.key for k in last.kept] == [("e", 1, 0), ("e", 2, 0)]
    assert last.dropped == {("a", "not taken"): 1, ("a", "not the last of its kept turns"): 1}


def test_doubles_and_caps() -> None:
    episodes = [pair("e", 1.0), pair("f", 1.0), pair("g", 1.0, task=Task("u", "?"))]
    assert kept(episodes, deduplicate=True) == [("e", 0, 0), ("e", 1, 0)], (
        "tokens of prompt and reply are the same"
    )
    assert kept(episodes, max_per_task=1) == [("e", 0, 0), ("e", 1, 0), ("g", 0, 0), ("g", 1, 0)]
    found = filter_turns(episodes, SelectionConfig(deduplicate=True, max_per_task=1))
    assert found.dropped == {("a", "a double"): 2, ("b", "a double"): 2}


def test_a_rule_of_ones_own_and_only_agents_that_learn() -> None:
    found = filter_turns(
        [pair("e", 0.0)], SelectionConfig(), lambda e, t: (0.5, "half"), agents=["b"]
    )
    assert [(k.key, k.weight, k.reason) for k in found.kept] == [
        (("e", 1, 0), 0.5, "half")
    ] and not found.dropped
    with pytest.raises(ValueError, match=r"turn 0 of 'a': weight -1.0; expected a number from 0"):
        filter_turns([pair("e", 0.0)], SelectionConfig(), lambda e, t: (-1.0, "less"))
    with pytest.raises(ValueError, match="two episodes have the same id"):
        filter_turns([pair("e", 0.0), pair("e", 0.0)], SelectionConfig())


def test_what_was_said_before_a_repair_belongs_to_the_run_that_failed() -> None:
    mended = episode("e", turn(0, "a", "x"), turn(1, "b", "y", source="written"), turn(2, "c", "z"))
    found = filter_turns([mended], SelectionConfig())
    assert {k.agent: k.reason for k in found.kept} == {"b": "repaired", "c": "success"}
    assert found.dropped == {("a", "before the repair"): 1}


def test_whoever_saw_the_answer_or_read_who_did_is_not_learnt_from() -> None:
    said = [
        turn(0, "a", "x"),
        turn(1, "critic", "y", saw_gold=True),
        turn(2, "a", "z", reads=(1,)),
        turn(3, "b", "w", reads=(2,)),
    ]
    one = episode("e", *said, turn(4, "b", "v", reads=(0,)))
    assert saw_answer(one) == {1, 2, 3}
    assert kept([one]) == [("e", 0, 0), ("e", 4, 0)]


def test_an_answer_in_a_prompt_is_a_leak_unless_somebody_had_found_it() -> None:
    clean, leaky = turn(0, "a", "15", "7+8"), turn(0, "a", "20", "7+8+5, which is 20")
    assert not leaks_answer(episode("e", clean), clean) and leaks_answer(episode("e", leaky), leaky)
    found = episode(
        "e", turn(0, "a", "It is 20."), turn(1, "b", "20", "a says: It is 20.", reads=(0,))
    )
    assert not leaks_answer(found, found.turns[1])
    gold = episode(
        "e", turn(0, "a", "It is 20.", saw_gold=True), turn(1, "b", "20", "a says: It is 20.")
    )
    assert leaks_answer(gold, gold.turns[1]), "who found it had been told"
    assert not leaks_answer(episode("e", leaky), leaky, opening="12+8 = 20"), (
        "a worked example shows it to every task"
    )
    five = Task("t", "What is 7+8+5?", "5")
    assert not leaks_answer(
        episode("e", clean, task=five), turn(0, "a", "5", "5 is in the task itself")
    )
    table = filter_turns([episode("e", leaky)], SelectionConfig()).table()
    assert table == {"a": {"kept": {}, "dropped": {"the answer stands in its prompt": 1}}}


@pytest.mark.parametrize(
    ("text", "answers", "told"),
    [
        ("it is 20", ["20"], True),
        ("it is 20.", ["20"], True),
        ("120", ["20"], False),
        ("20.5", ["20"], False),
        ("3.20", ["20"], False),
        ("Paris!", ["paris"], True),
        ("Parisian", ["paris"], False),
        ("1000", ["1,000", "1000"], True),
        ("", ["20"], False),
    ],
)
def test_answers_are_found_as_whole_words_and_numbers(
    text: str, answers: list[str], told: bool
) -> None:
    assert contains_answer(text, answers) is told


def test_every_spelling_of_every_answer() -> None:
    assert answer_spellings(Task("t", "?", "1,000")) == ["1,000", "1000"]
    assert (
        answer_spellings(Task("t", "?", [2, "two"])) == ["2", "two"]
        and answer_spellings(Task("t", "?")) == []
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"select": "sucess"}, "select: expected one of success, .* did you mean 'success'"),
        ({"turns": "middle"}, "turns: expected one of all, first, last"),
        ({"keep_share": 0.0}, "keep_share: expected a number above 0 to 1"),
        ({"max_per_task": -1}, "max_per_task: expected at least 0"),
        ({"reward_weights": "x"}, "reward_weights: expected a mapping"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        SelectionConfig(**settings)
