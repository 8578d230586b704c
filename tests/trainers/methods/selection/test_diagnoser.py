"""What a diagnoser is asked, and how its verdict is read (unit fact 5 of LLMSelector)."""

from __future__ import annotations

import asyncio

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.methods.selection.diagnoser import Diagnosis, diagnosis_task, verdict


@pytest.mark.parametrize(
    ("text", "guilt"),
    [
        ("... [final answer: Yes]", 1.0),
        ("**Final Answer** - YES!", 1.0),
        ("final answer: no.", 0.0),
        ("[Correct answer]", 0.0),
        ("I think module first is wrong", 0.5),
        ("", 0.5),
    ],
)
def test_verdicts(text: str, guilt: float) -> None:
    assert verdict(text) == guilt


def test_the_diagnoser_sees_every_output_and_the_right_answer() -> None:
    system = Chain([AgentSpec("first", "adds two digits"), "last"])
    turns = (Turn(0, "first", text="5"), Turn(1, "last", text="10 {module}"))
    episode = Episode("e", "g", Task("t", "7+8+5", "20"), turns=turns, output="10 {module}")
    task = diagnosis_task(episode, "first", system)
    assert task.id == "e/first" and task.answer is None
    for line in (
        '[Compound AI system]: "Chain of first (adds two digits), last"',
        "[question]: 7+8+5",
        '[Module first\'s output]: "5"',
        '[Module last\'s output]: "10 {module}"',
        "[The compound system's output]: 10 {module}",
        "[The desired correct answer]: 20",
        "Determine whether MODULE first is responsible",
    ):
        assert line in task.prompt
    team = fake_team(["diagnoser"], lambda agent, messages: "[final answer: Yes]")
    turn = asyncio.run(Diagnosis(["diagnoser"]).run(task, team))
    assert turn.text == "[final answer: Yes]" and turn.saw_gold
