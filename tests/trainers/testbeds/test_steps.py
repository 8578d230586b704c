"""The tiny designer of workflows in step language: its teacher, its team, and what it has learnt."""

from __future__ import annotations

import asyncio
import random

import pytest
import yaml

from marlora.agents.programs.step_workflow import StepWorkflow
from marlora.agents.programs.steps import StepsError, parse_steps
from marlora.agents.system import build_system
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, Task
from marlora.trainers.testbeds.programs import execute
from marlora.trainers.testbeds.steps import (
    ASKED,
    FORMS,
    TEAM,
    _Lessons,
    choices,
    design,
    shares,
    tiny_steps_model,
)
from tests.repository import ROOT


def fault(workflow: str) -> str:
    try:
        parse_steps(workflow)
    except StepsError as error:
        return str(error).split(":")[0]
    return ""


def test_the_teacher() -> None:
    assert [fault(form) for form in FORMS] == ["", "terminal", "target", "reachability"]
    written = design("c")
    assert len(written) == 24 and sum(written.values()) == pytest.approx(1.0)
    valid = sum(share for text, share in written.items() if not fault(text))
    assert valid == pytest.approx(0.7)
    right = sum(share for text, share in written.items() if ":::C" in text)
    slips = sum(share for text, share in written.items() if ":::A" in text)
    assert (right, slips) == (pytest.approx(ASKED), pytest.approx(0.45))


def test_choices_are_the_places_at_which_replies_part() -> None:
    found = dict(choices({"ab": 0.5, "a": 0.25, "ac": 0.25}))
    assert found == {"a": {"b": 0.5, "\0": 0.25, "c": 0.25}}
    places = dict(choices(design("a")))
    assert places["1:::process:::"] == {
        "A": pytest.approx(0.35),
        "B": pytest.approx(0.45),
        "C": pytest.approx(0.2),
    }
    step = "1:::process:::A:::next::"
    assert {char: round(share, 6) for char, share in places[step].items()} == {
        "2": 0.8,
        "1": 0.1,
        "3": 0.1,
    }


def test_lessons_hold_what_is_played() -> None:
    lessons = _Lessons(random.Random(0))
    for _ in range(20):
        prompt, [(tokens, share)] = lessons.design()
        shown = lessons.tokenizer.decode(prompt)
        text = lessons.tokenizer.decode(tokens).removesuffix("<|end|>")
        assert share == 1.0 and "<|system|>design<|end|>" in shown
        assert text in design(shown.removesuffix("<|end|><|assistant|>")[-1])
        prompt, targets = lessons.choice()
        assert len(targets) > 1 and sum(share for _, share in targets) == pytest.approx(1.0)
        assert all(len(tokens) == 1 for tokens, _ in targets)


def test_the_recipes_team_is_this_one_and_its_workflows_are_worth_what_they_ask_for() -> None:
    settings = yaml.safe_load((ROOT / "recipes" / "autoflow.yaml").read_text(encoding="utf-8"))
    system = StepWorkflow(**TEAM)
    assert build_system(settings["system"]).arguments() == system.arguments()

    def output(letter: str) -> str:
        def answer(agent: str, messages: tuple[Message, ...]) -> str:
            text = messages[-1].content
            return next(iter(execute(text[:-4], text[-4:])))

        form = next(iter(FORMS)).replace("K", letter)
        team = fake_team(system.specs, answer, {"workflow": form})
        return str(asyncio.run(system.run(Task("b472", "b472"), team)).text)

    assert [output(letter) for letter in ("A", "B", "B!", "C")] == ["3", "6", "6", "9"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them() -> None:
    from transformers import AutoModelForCausalLM

    found = shares(AutoModelForCausalLM.from_pretrained(tiny_steps_model()), 120)
    print(found)
    assert found["in grammar"] > 0.9 and found["careful"] > 0.97, found
    assert found["valid"] == pytest.approx(0.7, abs=0.08), found
    assert found["asks right"] == pytest.approx(ASKED, abs=0.08), found
    assert found["careless"] == pytest.approx(2 / 3, abs=0.08), found
