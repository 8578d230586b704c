"""A designer's talk: which program a reply holds, what a repair leaves of it, and one turn with its
siblings."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.programs.program import Program
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Message, SettingError, Task, Turn
from marlora.rollouts.sandbox.sandbox import run as execute
from marlora.trainers.methods.imitation.w4s_talk import (
    DesignTalkConfig,
    DesignTurn,
    read_reply,
    repaired_turn,
)

OPERATORS = ("custom", "ensemble")
GOOD = 'await custom("Think.")'
TWO = f"""The last program was short.
```python
await custom("Guess.")
```
A better one:
```python
x = {GOOD}
x
```
It prints
```
42
```
and no more."""


def test_the_program_is_the_last_closed_block_that_calls_a_function() -> None:
    """U6: what is printed and what is not closed are none."""
    reply = read_reply(TWO, OPERATORS, "fenced")
    assert (reply.program, reply.fault) == (f"x = {GOOD}\nx", "")
    open_end = f"{TWO}\n```python\nawait custom('never closed')"
    assert read_reply(open_end, OPERATORS, "fenced").program == reply.program
    for text in (
        "",
        "I know nothing better.",
        GOOD,
        "```\n42\n```",
        "```python\nmy_custom(1)\n```",
    ):
        none = read_reply(text, OPERATORS, "fenced")
        assert not none.program and none.fault.startswith("missing: no closed fenced block"), text


def test_a_repair_replaces_the_program_and_leaves_the_analysis() -> None:
    reply = read_reply(TWO, OPERATORS, "fenced")
    assert reply.with_program("await custom(1)") == TWO.replace(
        f"x = {GOOD}\nx\n", "await custom(1)\n"
    )
    nothing = read_reply("Let me think.", OPERATORS, "fenced")
    added = nothing.with_program(GOOD)
    assert added.startswith("Let me think.") and read_reply(added, OPERATORS, "fenced").program == (
        GOOD
    )


def test_a_small_model_writes_the_program_alone() -> None:
    reply = read_reply(GOOD, OPERATORS, "whole")
    assert reply.program == GOOD and reply.with_program("await custom(1)") == "await custom(1)"
    empty = read_reply("", OPERATORS, "whole")
    assert empty.fault == "missing: the reply is empty" and empty.with_program(GOOD) == GOOD


def test_a_repaired_turn_is_written_and_has_no_probabilities() -> None:
    turn = Turn(0, "designer", text="a", token_ids=(1, 2), logprobs=(-1.0, -2.0))
    assert repaired_turn(turn, "a") is turn
    new = repaired_turn(turn, "b")
    assert (new.text, new.token_ids, new.logprobs, new.source) == ("b", (), (), "written")


def talked(replies: list[str], **settings: Any) -> tuple[DesignTurn, Any]:
    """A turn of a designer that gives these replies in one request, and the team after it."""
    target = Program([AgentSpec("executor", policy="base")], operators=OPERATORS)
    talk = DesignTurn(
        [AgentSpec("designer", prompt="You design.")],
        target=target,
        candidates=len(replies),
        **settings,
    )
    left = iter(replies)
    team = fake_team(talk.specs, lambda agent, messages: next(left), execute=execute)
    asyncio.run(talk.run(Task("t", "Improve it."), team))
    return talk, team


def test_a_turn_goes_on_from_the_chat_and_dry_runs_its_siblings() -> None:
    history = (Message("user", "first"), Message("assistant", "reply"))
    broken = f"Oh.\n```python\nx = {GOOD}\n[1][2]\n```"
    _, team = talked([TWO, broken, "nothing"], history=history)
    assert [turn.sibling for turn in team.turns] == [0, 1, 2]
    assert {turn.index for turn in team.turns} == {0}, "one request"
    for turn in team.turns:
        assert [(m.role, m.content) for m in turn.messages] == [
            ("system", "You design."),
            ("user", "first"),
            ("assistant", "reply"),
            ("user", "Improve it."),
        ]
    faults = [operation.error for operation in team.operations]
    assert faults[0] == "" and faults[1].startswith("error: IndexError")
    assert "line 2: [1][2]" in faults[1] and faults[2].startswith("missing:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instruction": "{archive} {nonsense}"}, r"instruction: unknown field \{nonsense\}"),
        ({"feedback": "{accuracy"}, "feedback: unpaired '{'"),
        ({"repair": "{cases}"}, r"repair: unknown field \{cases\}"),
        ({"reply_format": "json"}, "reply_format"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        DesignTalkConfig(**settings)  # type: ignore[arg-type]


def test_a_repaired_program_stands_in_place_of_one_that_was_cut_off() -> None:
    """What is learnt reads as the repaired program, not as the fragment."""
    reply = read_reply("So:\n```python\nx = await custom('never clo", OPERATORS, "fenced")
    assert reply.fault
    text = reply.with_program(GOOD)
    assert read_reply(text, OPERATORS, "fenced").program == GOOD and "never" not in text
