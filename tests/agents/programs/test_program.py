"""A team whose program is a value: what is legal, how it ends, and what it may cost."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from marlora.agents.programs.operators import OPERATORS
from marlora.agents.programs.program import Program
from marlora.agents.state import check_values
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.transcript import Output
from marlora.agents.types import SettingError, Task, Usage
from marlora.rollouts.sandbox.sandbox import check
from marlora.rollouts.sandbox.sandbox import run as execute
from tests.conformance import check_system

TASK = Task("t", "3 + 4")
VOTE = 'a = await custom("A")\nb = await custom("B")\nawait ensemble([a, b])'


def play(
    system: Program, answers: Any, values: dict[str, Any] | None = None
) -> tuple[Output, Team]:
    team = fake_team(
        system.specs,
        lambda agent, messages: answers(agent, messages[-1].content),
        values,
        execute=execute,
        check=check,
    )
    return asyncio.run(system.run(TASK.public(), team)), team


def test_the_program_of_the_values_is_run_and_its_end_is_an_operation() -> None:
    def answers(agent: str, text: str) -> str:
        return "B" if "Several" in text else {"A": "6", "B": "7"}[text[-1]]

    output, team = play(Program(["executor"]), answers, {"program": VOTE})
    assert output.text == "7" and [turn.reads for turn in team.turns] == [(), (), (0, 1)]
    (ended,) = team.operations
    assert (ended.name, ended.text, ended.error, ended.reads) == ("program", "7", "", (1,))
    assert output.reads == (ended,)
    other, _ = play(Program(["executor"], program='await custom("A")'), answers)
    assert other.text == "6"


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("a = await custom('A')\nb = [][1]\na", "(line 2: b = [][1])"),
        ("def f(x):\n    return x.y\nf(await custom('A'))", "(line 2: return x.y)"),
        (
            "async def workflow():\n    return [][await custom('A')]",
            "(line 2: return [][await custom('A')])",
        ),
    ],
)
def test_an_error_names_the_line_that_raised(program: str, line: str) -> None:
    _, team = play(Program(["executor"]), lambda agent, text: "1", {"program": program})
    (ended,) = team.operations
    assert ended.error.startswith("error: ") and ended.error.endswith(line)
    assert asyncio.run(Program(["executor"]).dry_run(program, team)).endswith(line)


@pytest.mark.parametrize(
    ("program", "settings", "fault", "calls"),
    [
        ("while True:\n    pass\nawait custom('A')", {}, "time:", 0),
        ("while True:\n    a = await custom('A')\na", {"max_calls": 3}, "calls:", 3),
        ("while True:\n    a = await custom('A')\na", {"max_tokens": 8}, "calls:", 2),
        ("await custom('A')\n[][1]", {}, "error:", 1),
        ("a = await custom('A')\na * 30", {"max_text": 20}, "output:", 1),
    ],
)
def test_a_program_is_held_to_its_own_bounds(
    program: str, settings: dict[str, Any], fault: str, calls: int
) -> None:
    """Each reply of the executor counts three tokens of prompt and one sampled."""
    system = Program(["executor"], seconds=0.2, **settings)
    team = fake_team(system.specs, lambda agent, messages: "6", {"program": program},
                     execute=execute, check=check)  # fmt: skip
    complete = team.services.complete

    async def counted(call: Any) -> Any:
        return [_with_usage(each) for each in await complete(call)]

    object.__setattr__(team.services, "complete", counted)
    output = asyncio.run(system.run(TASK.public(), team))
    assert output.text == "" and team.operations[0].error.startswith(fault)
    assert len([turn for turn in team.turns if turn.text]) == calls


def _with_usage(completion: Any) -> Any:
    return dataclasses.replace(completion, usage=Usage(1, 3, 1))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (VOTE, None),
        ("await custom('x'", "syntax"),
        ("open('/etc/passwd')\nawait custom('x')", "name: 'open'"),
        ("().__class__\nawait custom('x')", "name: '__class__'"),
        ("async def ensemble(x):\n    return '7'\nawait custom('x')", "given and cannot"),
        ("'7'", "nodes: it calls 0"),
        (2 * "async def workflow():\n    return await custom('x')\n", "more than once"),
        ("\n".join(["await custom('x')"] * 11), "nodes: it calls 11 operators, expected 1 to 10"),
        (7, "expected a text"),
    ],
)
def test_only_valid_programs_are_values(value: Any, problem: str | None) -> None:
    (param,) = [p for p in Program(["executor"]).params() if p.name == "program"]
    fault = param.problem(value)
    assert (fault is None) if problem is None else problem in str(fault)
    if problem:
        with pytest.raises(SettingError, match=r"values\.program"):
            check_values(Program(["executor"]).params(), {"program": value})


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("attack", ["7, 7, 7", "[[1]]", "None", "{'a': 1}", "'x' * 10 ** 6"])
def test_arguments_that_no_operator_takes_end_the_program_and_nothing_else(
    operator: str, attack: str
) -> None:
    system = Program(["executor"], program=f"await {operator}({attack})", seconds=1.0)
    output, team = play(system, lambda agent, text: "A")
    assert output.text == "" and team.operations[0].error.startswith(("error:", "memory:"))
    assert not team.turns


def test_it_is_a_system_like_others() -> None:
    check_system(
        Program(["executor"], program=VOTE),
        [TASK],
        lambda agent, messages, marker: f"{marker} A",
        execute=execute,
        check=check,
    )


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(SettingError, match="program: no valid program"):
        Program(["executor"], program="1")
    with pytest.raises(SettingError, match=r"executors\.custom: 'nobody' is no executor"):
        Program(["executor"], executors={"custom": "nobody"})
