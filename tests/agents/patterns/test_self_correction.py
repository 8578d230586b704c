"""Mending one turn: who is told what, and what is marked as having seen the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.patterns.self_correction import SelfCorrection, correction_task
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, SettingError, Task, Turn
from tests.conformance import check_system

TASK = Task("t", "What is 7+8+5?", "20")
SAID = (
    Turn(0, "first", (Message("system", "Add."), Message("user", "7+8")), text="5"),
    Turn(1, "last", (Message("user", "5+5"),), (0,), text="10"),
)
MEND = correction_task(TASK, SAID[0], SAID)


def play(system: SelfCorrection, *answers: str) -> tuple[str, Team]:
    said = iter(answers)
    team = fake_team(system.specs, lambda agent, messages: next(said))
    return asyncio.run(system.run(MEND.public(), team)), team


def test_only_the_feedback_agent_is_told_the_answer_and_all_that_follows_from_it_is_marked() -> (
    None
):
    output, team = play(SelfCorrection(["critic", "first"]), "Mind the carry.", "7+8=15", " 15\n")
    assert output == "15"
    told = [turn.messages[-1].content for turn in team.turns]
    assert "The reference answer is: 20" in told[0] and "[first] 5\n\n[last] 10" in told[0]
    assert told[1].startswith("7+8\n\nYou wrote:\n5\n\nFeedback on it:\nMind the carry.") and told[
        2
    ].endswith("\n\n7+8=15")
    assert [
        ("20" in text, turn.agent, turn.saw_gold, turn.reads)
        for text, turn in zip(told, team.turns, strict=True)
    ] == [(True, "critic", True, ()), (False, "first", True, (0,)), (False, "first", True, (1,))]


def test_steps_can_be_left_out() -> None:
    output, team = play(SelfCorrection(["critic", "first"], feedback="", regenerate=""), "5!")
    assert output == "5!" and [turn.saw_gold for turn in team.turns] == [False]
    output, team = play(
        SelfCorrection(["critic", "first"], regenerate="{told}", rephrase=""),
        "Mind the carry.",
        "15",
    )
    assert output == "15" and [(t.saw_gold, t.reads) for t in team.turns] == [
        (True, ()),
        (False, ()),
    ], "it was not shown the feedback"
    assert team.turns[1].messages[-1].content == "7+8"


def test_the_task_of_a_repair_starts_from_another_text_if_told() -> None:
    assert (
        MEND.meta["said"] == "5" and correction_task(TASK, SAID[0], SAID, "15").meta["said"] == "15"
    )
    assert (
        MEND.answer is None
        and MEND.meta["answer"] == "20"
        and (MEND.id, MEND.split) == ("t", "repair")
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"regenerate": "{answer}"}, r"regenerate: unknown field \{answer\}"),
        ({"rephrase": "{feedback}"}, r"rephrase: unknown field \{feedback\}"),
        ({"feedback": "", "regenerate": "{feedback}"}, r"regenerate: unknown field \{feedback\}"),
        ({"feedback": "{"}, "feedback: unpaired '{'"),
        ({"regenerate": ""}, "regenerate: empty"),
        ({"agents": ["alone"]}, "two agents expected"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        SelfCorrection(**{"agents": ["critic", "first"], **settings})


@pytest.mark.parametrize("settings", [{}, {"regenerate": "{told}"}, {"feedback": ""}])
def test_it_conforms(settings: dict[str, str]) -> None:
    if settings.get("feedback") == "":
        settings = {**settings, "regenerate": "{told} again"}
    check_system(SelfCorrection(["critic", "first"], **settings), [MEND])  # type: ignore[arg-type]
