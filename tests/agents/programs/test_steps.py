"""The step language: what a line says, and every rule that a workflow can break."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.programs.step_workflow import MANUAL
from marlora.agents.programs.steps import Step, Steps, StepsError, parse_step, parse_steps

END = "\nend:::terminal"


def fault_of(text: str) -> str:
    with pytest.raises(StepsError) as refused:
        parse_steps(text)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_decision_has_all_its_branches() -> None:
    """Fact 1 of the sheet; the official parser reads {yes: step 3} alone of the second line."""
    step = parse_step("Step 2:::decision:::Enough?:::yes::step 3::no::step 1")
    assert step == Step("step 2", "decision", "Enough?", {"yes": "step 3", "no": "step 1"})
    with pytest.raises(StepsError, match="row: the line has 5 fields, expected Name:::Type:::"):
        parse_step("Step 2:::decision:::Enough?:::yes::step 3:::no::step 1")


@pytest.mark.parametrize("line", ["End:::Terminal", "end:::terminal:::", " end ::: TERMINAL::::::"])
def test_a_terminal_may_leave_its_last_fields_out(line: str) -> None:
    """The official parser raises an index error where the fourth is missing."""
    assert parse_step(line) == Step("end", "terminal")


def test_names_types_keys_and_targets_are_read_in_lower_case() -> None:
    flow = parse_steps(
        "The  First:::PROCESS:::Say A: it is::so:::NEXT::END\n\n\nEnd:::Terminal:::Be b."
    )
    assert flow.entry == Step("the first", "process", "Say A: it is::so", {"next": "end"})
    assert str(flow) == "the first:::process:::Say A: it is::so:::next::end\nend:::terminal:::Be b."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing: the workflow holds no step"),
        ("\n \n", "missing: the workflow holds no step"),
        ("Think, then answer.", "row: line 1 has 1 fields"),
        ("a::::process:::x:::next::end" + END, "row: line 1 holds colons that are neither"),
        (":::process:::x:::next::end" + END, "name: line 1 has no name"),
        ("a:::process:::x:::next::end\nA:::terminal" + END, "name: two steps are called 'a'"),
        ("a:::loop:::x:::next::end" + END, "type: 'a' is of type 'loop'"),
        ("a:::process::::::next::end" + END, "instruction: 'a' has none"),
        ("end:::terminal", "instruction: the workflow asks for nothing"),
        ("a:::process:::x" + END, "branches: 'a' is a process, so it has one branch, with key"),
        ("a:::process:::x:::yes::end" + END, "branches: 'a' is a process"),
        ("a:::process:::x:::next::end::no::a" + END, "branches: 'a' is a process"),
        ("a:::process:::x:::next" + END, "branches: of 'a', expected keys and names"),
        ("a:::process:::x:::next::" + END, "branches: of 'a', expected keys and names"),
        ("a:::decision:::x:::yes::end" + END, "branches: 'a' is a decision with 1"),
        ("a:::decision:::x:::yes::end::YES::a" + END, "branches: 'a' has two of one key"),
        ("a:::terminal:::x:::next::a", "branches: 'a' is a terminal and has none"),
        ("a:::process:::x:::next::ennd" + END, "target: 'a' leads to 'ennd', which is no step"),
        ("a:::process:::x:::next::b\nb:::process:::x:::next::a", "terminal: no step is one"),
        (
            "a:::decision:::x:::yes::end::no::b\nb:::process:::x:::next::b" + END,
            "terminal: none can be reached from 'b'",
        ),
        ("a:::process:::x:::next::end" + END + "\nc:::process:::x:::next::end", "reachability: nothing leads from 'a' to 'c'"),
        ("a:::process:::<tool_call>{}</tool_call>:::next::end" + END, "tool: line 1 holds '<tool_call>'"),
        ("\n".join(f"{n}:::process:::x:::next::{n + 1}" for n in range(20)) + "\n20:::terminal", "length: 21 steps, at most 20"),
        ("x" * 8001, "length: 8001 characters, at most 8000"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    assert words in fault_of(text)


NAMES = (
    st.text(alphabet="ab é'1", min_size=1, max_size=4)
    .map(lambda s: " ".join(s.split()))
    .filter(bool)
)
WORDS = st.text(min_size=1, max_size=20).map(lambda s: " ".join(s.split()).strip(": ")).filter(
    lambda s: bool(s) and ":::" not in s and "<" not in s
)  # fmt: skip


@st.composite
def workflows(draw: st.DrawFn) -> Steps:
    """A chain of processes and decisions that may lead back, with an end."""
    names = draw(st.lists(NAMES, min_size=2, max_size=6, unique_by=str.lower))
    names = [name.lower() for name in names]
    steps = {}
    for number, name in enumerate(names[:-1]):
        onward, back = names[number + 1], draw(st.sampled_from(names))
        branches = {"yes": onward, "no": back} if draw(st.booleans()) else {"next": onward}
        type_ = "decision" if len(branches) == 2 else "process"
        steps[name] = Step(name, type_, draw(WORDS), branches)
    end = Step(names[-1], "terminal", draw(st.one_of(st.just(""), WORDS)))
    return Steps({**steps, end.name: end})


@given(workflows())
@settings(max_examples=60, deadline=None)
def test_a_workflow_is_what_its_text_says(flow: Steps) -> None:
    assert parse_steps(str(flow)) == flow


@given(st.text(alphabet=":abnext\n ", max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_workflow_or_has_a_fault_of_one_line(text: str) -> None:
    try:
        assert parse_steps(str(parse_steps(text))) == parse_steps(text)
    except StepsError as error:
        assert ": " in str(error) and "\n" not in str(error)


def test_the_shipped_workflow_is_one() -> None:
    assert str(parse_steps(MANUAL)) == MANUAL


@pytest.mark.parametrize(
    "text",
    [
        "a ::: process ::: Work through these points: ::: next::b\nb ::: terminal",
        "a ::: decision ::: :is it so? ::: yes: :: b :: no :: b\nb ::: terminal ::: :end",
    ],
)
def test_colons_at_the_end_of_a_field_stay(text: str) -> None:
    flow = parse_steps(text)
    assert parse_steps(str(flow)) == flow
