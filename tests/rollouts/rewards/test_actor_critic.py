"""What actor, judge and critic earn, and what counts as near enough: SiriuS's scoring, by hand."""

from __future__ import annotations

import asyncio

import pytest

from marlora.agents.types import Task, Turn
from marlora.rollouts.rewards.actor_critic import label, roles
from marlora.rollouts.rewards.builtin import close
from marlora.rollouts.types import Episode

TASK = Task("t", "2+3?", "5")


def earned(*said: tuple[str, str]) -> list[tuple[str, float, str]]:
    turns = tuple(Turn(i, agent, text=text) for i, (agent, text) in enumerate(said))
    rewards = asyncio.run(roles(TASK, Episode("e", "g", TASK, turns=turns, output=turns[-1].text)))
    assert [r.turn for r in rewards] == list(range(len(said)))
    return [(str(r.agent), r.value, r.text) for r in rewards]


def test_each_role_earns_its_own() -> None:
    assert earned(
        ("actor", "4"),
        ("judge", "Verdict: wrong"),
        ("critic", "count again"),
        ("actor", "5"),
        ("judge", "Verdict: right"),
    ) == [
        ("actor", 0.0, ""),
        ("judge", 1.0, "NT"),
        ("critic", 1.0, ""),
        ("actor", 1.0, ""),
        ("judge", 1.0, "PT"),
    ]
    assert earned(
        ("actor", "5"), ("judge", "Verdict: wrong"), ("critic", "no"), ("actor", "6")
    ) == [("actor", 1.0, ""), ("judge", 0.0, "PF"), ("critic", 0.0, ""), ("actor", 0.0, "")]
    assert earned(("actor", "4"), ("judge", "Verdict: right")) == [
        ("actor", 0.0, ""),
        ("judge", 0.0, "NF"),
    ]
    assert earned(("actor", "5"), ("judge", "hm")) == [
        ("actor", 1.0, ""),
        ("judge", 0.0, "no verdict"),
    ]


def test_labels_of_judgements() -> None:
    table = {(True, True): "PT", (True, False): "PF", (False, False): "NT", (False, True): "NF"}
    assert {key: label(*key) for key in table} == table


@pytest.mark.parametrize(
    ("gold", "accepted", "rejected"),
    [
        (2.0, ["1.92", "2.08", "2", "It is 2.05"], ["2.081", "1.919", "none"]),
        (3, ["2.6", "3", "3.4"], ["2.4", "3.6"]),
        (0.0, ["0", "0.0"], ["0.001", "-0.001"]),
        ("yes", ["Answer: yes"], ["Answer: no"]),
    ],
)
def test_near_enough(gold: object, accepted: list[str], rejected: list[str]) -> None:
    for said, value in [*((text, 1.0) for text in accepted), *((text, 0.0) for text in rejected)]:
        assert (
            close(Task("t", "?", gold), Episode("e", "g", Task("t", "?"), output=said)) == value
        ), said
