"""Templates: fields filled in one pass, errors that name the setting."""

from __future__ import annotations

import pytest

from marlora.agents.text.templates import fields_in, render
from marlora.agents.types import SettingError


def test_fields_are_filled_in_one_pass() -> None:
    fields = {"a": "{b}", "b": 2, "c": lambda: "late"}
    assert render("{a} { b }{c} {{a}} }}{{", fields, setting="t") == "{b} 2late {a} }{"


def test_a_function_is_called_only_if_its_field_occurs() -> None:
    calls: list[str] = []
    fields = {"a": lambda: calls.append("a") or "A", "b": lambda: calls.append("b") or "B"}
    assert render("{a}{a}", fields, setting="t") == "AA" and calls == ["a", "a"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{prompts}",
            r"^views\.x: unknown field \{prompts\} for task 't'; did you mean 'prompt'\?$",
        ),
        ("{}", r"^views\.x: unknown field \{\} for task 't'; known: 'prompt'$"),
        ("a { b", r"^views\.x: unpaired '\{' in 'a \{ b'; write '\{\{' for a literal brace$"),
        ("a } b", r"^views\.x: unpaired '\}' in 'a \} b'; write '\}\}' for a literal brace$"),
        (5, r"^views\.x: expected a template such as '\{prompt\}', got 5$"),
    ],
)
def test_errors_name_the_setting(template: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        render(template, {"prompt": ""}, setting="views.x", context=" for task 't'")


def test_the_fields_of_a_template_stand_in_their_order() -> None:
    assert fields_in("{b} {{c}} {a} { b }", setting="t") == ["b", "a"]
    with pytest.raises(SettingError, match="t: unpaired"):
        fields_in("{b", setting="t")
