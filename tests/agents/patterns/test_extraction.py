"""An agent and a program that takes the answer out of its reply."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.patterns.extraction import Extraction
from marlora.agents.testing import check_system, fake_team
from marlora.agents.types import SettingError, Task
from marlora.rollouts.sandbox.sandbox import run

TASK = Task("t", "3 + 4", "7")
NUMBER = "import re\ndef extract(reply):\n    return re.findall(r'[0-9]+', reply)[-1]"


def played(reply: str = "It is 7.\n'''\\", values: Any = None, **settings: Any) -> Any:
    team = fake_team(["solver"], lambda agent, messages: reply, values, execute=run)
    output = asyncio.run(Extraction(["solver"], **settings).run(TASK, team))
    return output, team


def test_the_program_sees_the_reply_and_gives_the_output() -> None:
    output, team = played(extract=NUMBER, template="Solve {problem}!")
    assert output.text == "7"
    message, found = team.operations
    (turn,) = team.turns
    assert turn.messages[-1].content == "Solve 3 + 4!" == message.text
    assert (message.name, found.name) == ("template", "extract")
    assert turn.reads == (message.index,) and found.reads == (turn.index,)
    assert [node.index for node in output.reads] == [found.index]


def test_values_stand_in_for_the_settings() -> None:
    values = {"template": "{problem} =", "extract": NUMBER}
    output, team = played("7 or 8", values)
    assert output.text == "8" and team.operations[0].text == "3 + 4 ="


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return reply[1000]", "error: IndexError"),
        ("return None", "answer: None"),
        ("while True:\n        pass", "time: "),
        ("return 'x' * 100", "output: an answer of more than 50 characters"),
        ("return open('/etc/passwd').read()", "error: "),
        ("import os\n    return os.environ['HOME']", "error: "),
        ("return 1 / 0", "error: ZeroDivisionError"),
    ],
)
def test_whatever_the_program_does_is_on_record(body: str, words: str) -> None:
    """Also one that never ends, or looks for files and secrets: it ran in the sandbox."""
    program = f"def extract(reply):\n    {body}"
    output, team = played(extract=program, seconds=0.3, max_text=50)
    assert output.text == "" and team.operations[-1].error.startswith(words)


def test_it_is_a_system_like_any_other() -> None:
    check_system(Extraction(["solver"], extract=NUMBER), [TASK], execute=run)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"agents": ["a", "b"]}, "one agent expected, got 2"),
        ({"template": "Solve it"}, "template: expected the field {problem} alone, got []"),
        ({"template": "{problem} {answer}"}, "template: expected the field {problem} alone"),
        ({"template": "{problem"}, "template: "),
        ({"extract": "def extract(reply"}, "extract: no Python: "),
        ({"extract": "x = 1"}, "extract: it defines no function extract(reply)"),
        ({"extract": NUMBER, "max_chars": 9}, "characters, at most 9"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError) as refused:
        Extraction(**{"agents": ["solver"], **settings})
    assert words in str(refused.value)
