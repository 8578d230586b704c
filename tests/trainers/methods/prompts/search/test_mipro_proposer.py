"""Which replies of MIPRO's proposer are instructions that can be tried."""

from __future__ import annotations

import pytest

from marlora.agents.state import Param
from marlora.agents.types import Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.search.mipro_proposer import cut_off, read, usable


def reply(text: str | None, finish_reason: str = "stop") -> Episode:
    turns = () if text is None else (Turn(0, "proposer", text=text, finish_reason=finish_reason),)
    return Episode("e", "g", Task("t", "p"), turns=turns, output=text)


def param(agent: str = "a", value: str = "now") -> Param:
    def legal(value: str) -> str | None:
        return "swears" if "damn" in value else None

    return Param(f"{agent}.prompt", value, "text", agent, legal=legal)


def tagged(text: str) -> str:
    return f"Here it is.\n<INSTRUCTION>{text}</INSTRUCTION>"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (reply(None), "unanswered"),
        (reply("  "), "unanswered"),
        (reply(tagged(" ")), "unanswered"),
        (reply("<INSTRUCTION>Think of"), "truncated"),
        (reply("Think of", "length"), "truncated"),
        (reply(tagged("x" * 21)), "too_long"),
        (reply(tagged("now")), "duplicate"),
        (reply(tagged("damn it")), "refused"),
    ],
)
def test_what_cannot_be_tried_is_dropped_and_counted(given: Episode, reason: str) -> None:
    found = usable([param(), param()], [given, reply(tagged("Think."))], 20)
    assert found.texts == {"a": ["Think."]} and found.dropped == {reason: 1}
    assert (found.asked, found.usable) == (2, 1)


def test_instructions_stand_by_agent_and_equal_ones_once() -> None:
    params = [param("a"), param("a"), param("b"), param("b")]
    found = usable(params, [reply(tagged(text)) for text in ("x", "x", "x", "y")], 20)
    assert found.texts == {"a": ["x"], "b": ["x", "y"]} and found.dropped == {"duplicate": 1}


def test_an_instruction_stands_between_the_tags_or_is_all_of_the_reply() -> None:
    assert read(reply(tagged(" Think. "))) == "Think." and read(reply(" Think.\n")) == "Think."
    whole = reply(tagged("Think.") + " and more words", "length")
    assert read(whole) == "Think." and not cut_off(whole), "what was cut off came after it"
