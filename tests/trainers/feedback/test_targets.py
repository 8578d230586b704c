"""Which params are rewritten, and values that hold training tasks."""

from __future__ import annotations

import pytest

from marlora.agents.state import Param
from marlora.agents.types import SettingError, Task
from marlora.trainers.feedback.targets import chosen_params, copied_tasks

PARAMS = [
    Param("a.prompt", "", "text", "a"),
    Param("a.demos", [], "demos", "a"),
    Param("edges", {}, "logits"),
    Param("program", "", "program"),
]
LONG = "How many apples are left\nif Ann eats two of nine?"


def test_the_prompts_of_agents_or_those_that_are_named() -> None:
    assert [p.name for p in chosen_params(PARAMS, [])] == ["a.prompt"]
    names = ["program", "a.prompt", "program"]
    assert [p.name for p in chosen_params(PARAMS, names)] == ["program", "a.prompt"]


def test_the_policies_of_a_run_are_the_options_of_a_seat() -> None:
    """A model may name one that nobody serves."""
    params = [*PARAMS, Param("a.policy", "a", "choice", "a")]
    (seat,) = chosen_params(params, ["a.policy"], ("base", "a", "b"))
    assert seat.problem("b") is None and "gpt-4" in (seat.problem("gpt-4") or "")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.promt"], "params: no param 'a.promt'; did you mean 'a.prompt'?"),
        (["edges"], "params: edges is of kind logits; expected one of text"),
    ],
)
def test_params_that_cannot_be_rewritten(names: list[str], words: str) -> None:
    with pytest.raises(SettingError) as refused:
        chosen_params(PARAMS, names)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("value", "before", "copied"),
    [
        ("Think.", "", []),
        ("Think. How many apples  are left if Ann eats\n two of nine? Answer 7.", "", ["long"]),
        (f"Such as {LONG}", LONG, []),  # it was there before
        ("2+2", "", []),  # a short prompt alone is chance
        ("2+2 is 4", "", ["short"]),
        ("2+2 is 45", "", ["short"]),  # it begins like the answer: better one flag too many
        (["say", LONG.replace("\n", " ")], [], ["long"]),
    ],
)
def test_training_tasks_that_a_value_holds_word_for_word(
    value: object, before: object, copied: list[str]
) -> None:
    tasks = [Task("long", LONG, "7"), Task("short", "2+2", "4"), Task("empty", " ", "x")]
    assert copied_tasks(value, before, tasks) == copied
