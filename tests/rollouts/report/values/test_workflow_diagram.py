"""The diagram of a workflow in step language: where its steps stand, what its arrows lead to, and
that nothing a model wrote is markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from marlora.agents.programs.step_workflow import MANUAL
from marlora.agents.programs.steps import parse_steps
from marlora.rollouts.report.values.texts import whole_text
from marlora.rollouts.report.values.workflow_diagram import diagram, places_of

FLOW = """a:::decision:::Which?:::x::b::y::c
b:::process:::Once more.:::next::a
c:::terminal"""


def test_places_by_hand() -> None:
    """a - b
    \\ c"""
    assert places_of(parse_steps(FLOW)) == {"a": (0, 0), "b": (1, 0), "c": (1, 1)}
    places = places_of(parse_steps(MANUAL))
    assert places == {"step 1": (0, 0), "step 2": (1, 0), "step 3": (2, 0)}


def test_every_step_is_a_box_and_every_branch_an_arrow() -> None:
    svg = ET.fromstring(re.search("<svg.*</svg>", diagram(FLOW))[0])  # type: ignore[index]
    assert [group.get("class") for group in svg.iter("g")] == ["decision", "process", "terminal"]
    assert len([path for path in svg.iter("path") if path.get("class") == "tip"]) == 3
    keys = [each.text for each in svg.findall("text")]
    assert keys == ["x", "y"], "the branch of a process has no label"
    assert "a: Which?" in [title.text for title in svg.iter("title")]
    forward, _, back = (path.get("d") or "" for path in svg.iter("path") if not path.get("class"))
    assert forward.startswith("M162 50C") and back.startswith("M308 30C")


def test_a_models_words_are_no_markup() -> None:
    evil = "<script>alert(1)</script>\" onload='x"
    made = diagram(f"{evil}:::decision:::{evil}:::<b>::end::\"'&::end\nend:::terminal:::")
    assert made and "<script" not in made and "<b>" not in made and "onload='" not in made
    svg = ET.fromstring(re.search("<svg.*</svg>", made)[0])  # type: ignore[index]
    assert {tag.tag for tag in svg.iter()} == {"svg", "title", "path", "text", "g", "rect"}


def test_only_workflows_are_drawn_beside_their_text() -> None:
    assert diagram("say 1") == diagram("") == diagram("a:::process:::x:::next::a") == ""
    assert whole_text(FLOW).startswith("<pre>a:::decision") and "<svg" in whole_text(FLOW)
    assert "<svg" not in whole_text("say 1")
