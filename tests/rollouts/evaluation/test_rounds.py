"""Accuracy of rounds and transitions between them, by hand."""

from __future__ import annotations

from marlora.agents.types import Reward, Task, Turn
from marlora.rollouts.evaluation.rounds import answers_by_round, transition_rows, transitions
from marlora.rollouts.types import Episode

MEMBERS = {"a-1": "a", "b-1": "b", "a-2": "a", "b-2": "b"}


def episode(*rows: tuple[float, float], error: str | None = None, name: str = "right") -> Episode:
    """A debate of a and b: per round, who was right."""
    turns, rewards = [], []
    for number, row in enumerate(rows):
        for member, value in zip("ab", row, strict=True):
            rewards.append(Reward(name, value, turn=len(turns)))
            turns.append(Turn(len(turns), f"{member}-{min(number, 1) + 1}"))
    return Episode(
        "e", "g", Task("t", "?"), turns=tuple(turns), rewards=tuple(rewards), error=error
    )


def test_rounds_are_a_members_answers_in_order():
    played = episode((1, 0), (1, 1), (0, 1))
    untaken = Turn(2, "a-2", sibling=1, taken=False)
    other = Turn(9, "judge")
    mixed = Episode("e", "g", Task("t", "?"), turns=(*played.turns, untaken, other))
    assert [{m: t.index for m, t in row.items()} for row in answers_by_round(mixed, MEMBERS)] == [
        {"a": 0, "b": 1},
        {"a": 2, "b": 3},
        {"a": 4, "b": 5},
    ]


def test_numbers_by_hand():
    """Rounds: 3 of 6, 3 of 4 (the second debate ended early), 1 of 2; last answers 4 of 6 right
    against 3 of 6 first ones."""
    debates = [episode((1, 0), (1, 1), (0, 1)), episode((1, 1)), episode((0, 0), (0, 1))]
    found = transitions([*debates, episode((1, 1), error="lost")], MEMBERS)
    assert found["answers"] == [6, 4, 2] and found["accuracy"] == [0.5, 0.75, 0.5]
    assert found["gain"] == (4 - 3) / 6
    assert found["changes"] == [
        {"right_right": 1, "right_wrong": 0, "wrong_right": 2, "wrong_wrong": 1},
        {"right_right": 1, "right_wrong": 1, "wrong_right": 0, "wrong_wrong": 0},
    ]


def test_answers_without_a_label_are_left_out():
    found = transitions(
        [episode((1, float("nan")), (0, 1)), episode((1, 1), name="other")], MEMBERS
    )
    assert (
        found["answers"] == [1, 2]
        and found["changes"][0]["right_wrong"] == 1
        and sum(found["changes"][0].values()) == 1
    )
    assert transitions([], MEMBERS) == {"answers": [], "accuracy": [], "gain": None, "changes": []}


def test_rows_for_people():
    before = transitions([episode((1, 0), (1, 1))], MEMBERS)
    head, rows = transition_rows({"before": before, "after": transitions([], MEMBERS)})
    assert head == ["", "round 1", "round 2", "last - first", "wrong to right", "right to wrong"]
    assert rows == [
        ["before", "0.500", "1.000", "+0.500", "1 of 1", "0 of 1"],
        ["after", "", "", "", "0 of 0", "0 of 0"],
    ]
