"""A team that follows a workflow in step language: the order of its steps, its notes, its tools,
its bounds, and what a designer is asked and has written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from marlora.agents.programs.step_workflow import MANUAL, StepWorkflow, key_in
from marlora.agents.state import check_values
from marlora.agents.team import Team
from marlora.agents.testing import check_system, fake_team
from marlora.agents.transcript import Output
from marlora.agents.types import AgentSpec, Message, SettingError, Task

TASK = Task("t", "3 + 4", "7")
LOOP = """try:::process:::Try it.:::next::ask
ask:::decision:::Good?:::yes::end::not yet::try
end:::terminal:::Say it."""


def system(**settings: Any) -> StepWorkflow:
    return StepWorkflow(["designer", "reader"], designer="designer", **settings)


def play(
    made: StepWorkflow, answer: Callable[[str], str], workflow: str | None = LOOP, **services: Any
) -> tuple[Output, Team]:
    values = {} if workflow is None else {"workflow": workflow}
    team = fake_team(
        made.specs, lambda _, messages: answer(messages[-1].content), values, **services
    )
    return asyncio.run(made.run(TASK.public(), team)), team


def test_steps_are_taken_as_the_branches_say_and_notes_are_read() -> None:
    answers = iter(["one", "Not yet", "two", "It is good. YES", "seven"])
    output, team = play(system(), lambda _: next(answers))
    assert output.text == "seven" and {turn.agent for turn in team.turns} == {"reader"}
    steps, ended = team.operations
    assert (steps.name, steps.text) == ("steps", "try > ask > try > ask > end")
    assert (ended.name, ended.text, ended.error, ended.reads) == ("workflow", "seven", "", (4,))
    assert output.reads == (ended,)
    assert [turn.reads for turn in team.turns] == [(), (0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    second = team.turns[1].messages[-1].content
    assert second.startswith("3 + 4\n\nYou noted at try: one\n\nDo this step") and (
        second.endswith(
            "Good?\n\nEnd with one of these answers alone on the last line: yes, not yet"
        )
    )


def test_notes_are_the_last_ones_and_a_terminal_without_instruction_leaves_the_last_reply() -> None:
    flow = "\n".join(f"{n}:::process:::do {n}:::next::{n + 1}" for n in range(4)) + "\n4:::terminal"
    output, team = play(system(num_notes=2), lambda text: f"<{text[-1]}>", flow)
    assert output.text == "<3>" and [t.reads for t in team.turns] == [(), (0,), (0, 1), (1, 2)]
    assert "<0>" not in team.turns[3].messages[-1].content
    _, team = play(system(num_notes=0), lambda text: "x", flow)
    assert all(turn.reads == () for turn in team.turns)


@pytest.mark.parametrize(
    ("reply", "settings", "error", "turns"),
    [
        ("who knows", {}, "branch: 'ask' was answered with none of yes, not yet", 2),
        ("not yet", {}, "steps: no terminal within 20", 20),
        ("not yet", {"max_rounds": 3}, "steps: no terminal within 3", 3),
    ],
)
def test_a_run_that_comes_to_no_end_has_no_answer_and_says_why(
    reply: str, settings: dict[str, Any], error: str, turns: int
) -> None:
    output, team = play(system(**settings), lambda _: reply)
    assert output.text == "" and team.operations[-1].error == error and len(team.turns) == turns


def test_a_terminal_is_the_last_of_the_steps_that_may_be_taken() -> None:
    output, team = play(system(max_rounds=3), lambda _: "yes")
    assert output.text == "yes" and len(team.turns) == 3 and not team.operations[-1].error


@pytest.mark.parametrize(
    ("reply", "key"),
    [
        ("yes", "yes"),
        ("No, not yet: no. Yes!", "yes"),
        ("yes or rather\nNOT  YET", "not yet"),
        ("yesterday, notyet, eyes", ""),
        ("it is yes; no", "no"),
        ("", ""),
    ],
)
def test_the_branch_is_the_key_that_a_reply_names_last(reply: str, key: str) -> None:
    assert key_in(reply, ("no", "yes", "not yet", "yet")) == key


def test_the_interpreters_tools_are_called_inside_a_step_and_others_do_not_exist() -> None:
    made = StepWorkflow([AgentSpec("reader", tools=("calculator",))], workflow="a:::process:::Add.:::next::b\nb:::terminal")  # fmt: skip
    call = '<tool_call>{"name": "%s", "arguments": {"expression": "3 + 4"}}</tool_call>'

    def answer(text: str) -> str:
        return text if "tool_response" in text else call % name

    name = "calculator"
    output, team = play(made, answer, None)
    assert "<tool_response>\n7\n</tool_response>" in output.text and len(team.turns) == 2
    name = "delete_files"
    assert "error: no tool 'delete_files'" in play(made, answer, None)[0].text
    assert "these tools: calculator\n" in made.design_prompt()


def test_a_designer_is_told_the_format_and_no_task() -> None:
    made = system(description="sums of two numbers", max_steps=7)
    asked = made.design_prompt()
    assert "of this kind: sums of two numbers" in asked and MANUAL in asked and "At most 7" in asked
    assert "these tools: none" in asked and LOOP in made.design_prompt(LOOP)


@pytest.mark.parametrize(
    ("reply", "tag", "workflow", "fault"),
    [
        (f"Sure.\n<workflow>\n{LOOP.upper()}\n</workflow>", "workflow", LOOP.lower(), ""),
        (f"<workflow>{MANUAL}</workflow> no: <workflow>{LOOP}</workflow>", "workflow", LOOP, ""),
        (LOOP, "", LOOP, ""),
        (LOOP, "workflow", "", "missing: the reply holds no workflow"),
        (f"<workflow>{LOOP}", "workflow", "", "missing: the reply holds no workflow"),
        ("<workflow>a:::terminal</workflow>", "workflow", "", "instruction: the workflow asks"),
    ],
)
def test_what_a_designers_reply_holds(reply: str, tag: str, workflow: str, fault: str) -> None:
    text, why = system(tag=tag).read(reply)
    assert text.lower() == workflow.lower() and why.startswith(fault) and bool(text) != bool(why)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (LOOP, None),
        ("a:::process:::x:::next::a", "terminal: no step is one"),
        (7, "expected a text"),
    ],
)
def test_only_valid_workflows_are_values(value: Any, problem: str | None) -> None:
    params = system().params()
    if problem is None:
        check_values(params, {"workflow": value})
        return
    with pytest.raises(SettingError, match=rf"values\.workflow: .*{problem}"):
        check_values(params, {"workflow": value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"agents": ["a"], "designer": "a"}, "an interpreter expected beside the designer"),
        ({"designer": "desinger"}, "designer: 'desinger' is no agent; did you mean"),
        ({"interpreter": "designer"}, "interpreter: 'designer' is no agent that can follow"),
        ({"workflow": "a:::b"}, "workflow: no valid workflow \\(type:"),
        ({"ask": "{promt}"}, "ask: unknown field {promt}"),
        ({"note": "{name}"}, "note: unknown field {name}"),
        ({"design": "{tasks}"}, "design: unknown field {tasks}"),
        ({"max_rounds": 0}, "max_rounds"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        StepWorkflow(**{"agents": ["designer", "reader"], "designer": "designer", **settings})


def test_what_the_interpreter_answers_depends_on_no_designer() -> None:
    made = system(description="x").without_designer()
    assert [spec.name for spec in made.specs] == ["reader"] and made.description == "x"


@pytest.mark.parametrize("key", ["yes", "no"])
def test_it_is_a_system_like_others(key: str) -> None:
    def answer(agent: str, messages: tuple[Message, ...], marker: str) -> str:
        return f"{marker} {key}" if "one of these" in messages[-1].content else marker

    check_system(system(max_rounds=8), [TASK], answer)
