"""MAS-GPT's system: which block is the program, what answers without one, and what a crash is
worth. The numbers are those of the sheet's unit facts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from marlora.agents.programs.mas_gpt import FELL_BACK, MASGPT, call_cost, executing_team
from marlora.agents.programs.restrictions import program_of
from marlora.agents.team import Team
from marlora.agents.testing import fake_team
from marlora.agents.types import SettingError, Task
from marlora.rollouts.sandbox.sandbox import check
from marlora.rollouts.sandbox.sandbox import run as execute
from tests.conformance import check_system

FENCE = "```python"
TASK = Task("t", "3 + 4")
AGENTS = ["designer", "solver"]
ONE, TWO = 'await custom("one")', 'await custom("two")'


def fenced(program: str, language: str = "python") -> str:
    return f"```{language}\n{program}\n```"


def play(reply: str, **settings: Any) -> tuple[str, Team]:
    """Output and team; the designer writes this reply, the solver repeats the end of its
    prompt."""
    system = MASGPT(AGENTS, **settings)

    def answer(agent: str, messages: Any) -> str:
        return reply if agent == "designer" else messages[-1].content[-3:]

    team = fake_team(system.specs, answer, execute=execute, check=check)
    return asyncio.run(system.run(TASK, team)), team


def valid(team: Team) -> tuple[float, str]:
    (only,) = [r for r in team.rewards if r.name == "valid"]
    return only.value, only.text.partition(":")[0]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (f"First {fenced(ONE)} or\n{fenced(TWO)}", TWO),  # the first fence begins no line
        (f"Or\n{fenced(ONE)}\nor\n{fenced(TWO)}\nDone.", TWO),
        (fenced(ONE, ""), None),
        (fenced(ONE, "text"), None),
        (fenced(ONE, "pythonic"), None),
        (f"{fenced(ONE)}\n{fenced(TWO, '')}", ONE),
        (f"{fenced(ONE)}\n```python\n{TWO}", ONE),  # cut off
        (fenced(f"X = ''''a ``` b''''\n{ONE}"), f"X = ''''a ``` b''''\n{ONE}"),
        (fenced(""), None),
        (ONE, None),
        ("", None),
    ],
)
def test_the_program_is_the_last_block_fenced_as_python(text: str, program: str | None) -> None:
    assert program_of(text, FENCE) == program


def test_two_blocks_run_the_second() -> None:
    output, team = play(f"Like\n{fenced(ONE)}\nbetter\n{fenced(TWO)}")
    assert output == "two" and valid(team) == (1.0, "")
    assert [turn.agent for turn in team.turns] == AGENTS and not team.operations


def test_without_a_tagged_block_the_fallback_answers_by_six_calls() -> None:
    output, team = play(f"I think\n{fenced(ONE, '')}")
    assert valid(team) == (0.0, "missing")
    (fell,) = team.operations
    assert fell.name == FELL_BACK and fell.text == output and not fell.error
    calls = [turn for turn in team.turns if turn.agent == "solver"]
    assert len(calls) == 6
    assert call_cost(1, len(calls)) == 6.5
    last = calls[-1].messages[-1].content
    assert last.count("\n\nne.") == 5, "the decision reads five solutions"
    assert not [r for r in team.rewards if r.name == "ran"], "no program of the designer ran"


@pytest.mark.parametrize("program", [f"{ONE}\n1 // 0", f"{ONE}\nNone", "await magic()", "x = ("])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_program_that_fails_has_no_answer_and_no_fallback(program: str, dry_run: bool) -> None:
    output, team = play(fenced(program), dry_run=dry_run)
    assert output == "" and not team.operations
    told = {r.name: r.value for r in team.rewards}
    assert 0.0 in told.values()
    assert all(r.text for r in team.rewards if not r.value), "and it says why"


def test_a_program_that_runs_out_of_time_is_answered_by_the_fallback_and_stays_on_record() -> None:
    loop = f"{ONE}\nwhile True:\n    pass\n1"
    output, team = play(fenced(loop), dry_run=False, seconds=0.3, fallback=TWO)
    assert output == "two" and [each.name for each in team.operations] == [FELL_BACK]
    told = {r.name: (r.value, r.text.partition(":")[0]) for r in team.rewards}
    assert told == {"valid": (1.0, ""), "ran": (0.0, "time")}
    assert loop in team.turns[0].text


def test_without_a_fallback_nothing_is_run() -> None:
    output, team = play("no idea", fallback="")
    assert output == "" and len(team.turns) == 1 and not team.operations


def test_the_designer_sees_operators_an_example_and_the_query() -> None:
    prompt = MASGPT(AGENTS, operators=["custom", "review"]).instructed(TASK)
    assert "await custom(" in prompt and "await review(" in prompt and "ensemble" not in prompt
    assert prompt.endswith("The query:\n3 + 4") and program_of(prompt, FENCE) is not None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"attempts": 3}, "attempts: MAS-GPT generates once, got 3"),
        ({"fallback": "1 +"}, "fallback: no valid program"),
        ({"operators": ["review"]}, "fallback: no valid program"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        MASGPT(AGENTS, **settings)


def test_the_executing_team_is_the_workflow_without_its_designer() -> None:
    settings: dict[str, Any] = {
        "operators": ["custom"],
        "prompts": {"custom": "{instruction}"},
        "max_calls": 7,
        "max_nodes": 3,
        "seconds": 2.0,
    }
    team = executing_team(MASGPT(AGENTS, **settings), TWO)
    assert [spec.name for spec in team.specs] == ["solver"] and team.program == TWO
    assert {name: getattr(team, name) for name in settings} == settings
    with pytest.raises(SettingError, match="calls 4 operators, expected 1 to 3"):
        executing_team(MASGPT(AGENTS, **settings), "\n".join([ONE] * 4))


@pytest.mark.parametrize("reply", [TWO, "", f"{ONE}\n1 // 0"])
def test_it_conforms(reply: str) -> None:
    """With a program, with the fallback, and with a crash."""

    def answer(agent: str, messages: Any, marker: str) -> str:
        program = reply.replace('("', f'("{marker} ')
        return f"{marker}\n{fenced(program)}" if agent == "designer" else marker

    check_system(MASGPT(AGENTS), [TASK], answer, execute=execute, check=check)
