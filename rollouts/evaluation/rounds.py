"""Accuracy of every debate round, and how many answers go from wrong to right and back between two
rounds. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...agents.types import Turn
from ..types import Episode

CHANGES = ("right_right", "right_wrong", "wrong_right", "wrong_wrong")


def answers_by_round(episode: Episode, member_of: Mapping[str, str]) -> list[dict[str, Turn]]:
    """The taken turns of a debate by round and member: a member's n-th answer is of round n. Agents
    that are no member are left out."""
    rounds: list[dict[str, Turn]] = []
    count: dict[str, int] = {}
    for turn in episode.turns:
        member = member_of.get(turn.agent)
        if member is None or not turn.taken:
            continue
        number = count.get(member, 0)
        count[member] = number + 1
        if number == len(rounds):
            rounds.append({})
        rounds[number][member] = turn
    return rounds


def transitions(
    episodes: Iterable[Episode], member_of: Mapping[str, str], name: str = "right"
) -> dict[str, Any]:
    """Numbers of `summary.json`, from rewards of turns called `name` (right from 0.5). Failed
    episodes, and answers without one, are left out.

    answers: how many of every round.    accuracy: their share right.    gain: accuracy of last
    answers minus that of first ones, over the debates (one that ended early has its last answers in
    an earlier round).    changes: for every round but the first, how many answers changed how
    against the member's answer before.
    """
    right: list[list[int]] = []  # per round: answers, right ones
    changes: list[dict[str, int]] = []
    ends = [0, 0, 0]  # debates' answers, first right, last right
    for episode in episodes:
        if episode.error is not None:
            continue
        values = {
            (r.turn, r.sibling): r.value
            for r in episode.rewards
            if r.name == name and r.value == r.value
        }
        before: dict[str, bool] = {}
        first: dict[str, bool] = {}
        for number, row in enumerate(answers_by_round(episode, member_of)):
            if number == len(right):
                right.append([0, 0])
                changes.append(dict.fromkeys(CHANGES, 0))
            for member, turn in row.items():
                if (turn.index, turn.sibling) not in values:
                    continue
                now = values[turn.index, turn.sibling] >= 0.5
                right[number][0] += 1
                right[number][1] += now
                if member in before:
                    changes[number][f"{_word(before[member])}_{_word(now)}"] += 1
                first.setdefault(member, now)
                before[member] = now
        ends = [ends[0] + len(first), ends[1] + sum(first.values()), ends[2] + sum(before.values())]
    return {
        "answers": [total for total, _ in right],
        "accuracy": [hits / total if total else None for total, hits in right],
        "gain": (ends[2] - ends[1]) / ends[0] if ends[0] else None,
        "changes": changes[1:],
    }


def transition_rows(by_name: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table, one row per name; `by_name` holds `transitions` by name,
    as `collaboration` in `summary.json` does."""
    rounds = max((len(entry["accuracy"]) for entry in by_name.values()), default=0)
    head = [
        "",
        *(f"round {n + 1}" for n in range(rounds)),
        "last - first",
        "wrong to right",
        "right to wrong",
    ]
    rows = []
    for name, entry in by_name.items():
        accuracy = [*entry["accuracy"], *[None] * (rounds - len(entry["accuracy"]))]
        count = {change: sum(row[change] for row in entry["changes"]) for change in CHANGES}
        rows.append(
            [
                name,
                *("" if value is None else f"{value:.3f}" for value in accuracy),
                "" if entry["gain"] is None else f"{entry['gain']:+.3f}",
                f"{count['wrong_right']} of {count['wrong_right'] + count['wrong_wrong']}",
                f"{count['right_wrong']} of {count['right_wrong'] + count['right_right']}",
            ]
        )
    return head, rows


def _word(right: bool) -> str:
    return "right" if right else "wrong"
