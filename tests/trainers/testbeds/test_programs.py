"""The tiny designer's tasks, its teacher, its workflow, and what it has learnt."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

import pytest
import yaml

from marlora.agents.programs.workflow import Workflow
from marlora.agents.system import build_system
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, Task
from marlora.rollouts.sandbox.sandbox import run as sandboxed
from marlora.rollouts.tasks.toy import KINDS, digit, program_tasks
from marlora.trainers.testbeds.programs import (
    ASKED,
    BROKEN,
    DESIGN,
    DO,
    FORMS,
    LONGEST,
    _Lessons,
    design,
    excess,
    execute,
    shares,
    tiny_programs_model,
)
from tests.repository import ROOT
from tests.trainers.tiny_workflow import tiny_workflow


def test_tasks() -> None:
    train, held_out = program_tasks(), program_tasks("eval")
    assert len(train) + len(held_out) == 3000 and not {t.id for t in train} & {
        t.id for t in held_out
    }
    assert program_tasks(seed=1) != train
    assert [digit(kind, "b478") for kind in KINDS] == ["9", "2", "5"]  # 8 + 1, + 4, + 7
    for task in train[:50]:
        assert [[len(p), p[0], digit(p[0], p)] for p, _ in task.meta["examples"]] == [
            [4, task.prompt[0], a] for _, a in task.meta["examples"]
        ]


def test_the_teacher() -> None:
    assert execute("A", "b472") == {
        "3": pytest.approx(2 / 3),
        "4": pytest.approx(1 / 3),
    } and execute("B!", "a472") == {"6": 1.0}
    first = design("b")
    assert asked(first) == {
        "a": pytest.approx(0.1),
        "b": pytest.approx(0.35),
        "c": pytest.approx(0.45),
    }  # c comes after b: the slip
    assert asked(design("c")) == {
        "a": pytest.approx(0.45),
        "b": pytest.approx(0.1),
        "c": pytest.approx(0.35),
    }
    assert sum(first.values()) == pytest.approx(1.0) and sum(
        share for text, share in first.items() if "magic" in text
    ) == pytest.approx(0.1)
    careful = 'await custom("K!")'
    again = asked(
        design("b", [("a", careful, "2/2")])
    )  # .1 twenty times, beside .35, .45, and .1 of none
    assert again["a"] == pytest.approx(2 / 2.9)
    assert (
        design("b", [("b", careful, "0/2")])['await custom("B!")']
        < first['await custom("B!")'] / 10
    )
    assert max(design("b", [("a", BROKEN, "invalid")]).values()) > max(first.values())


def asked(programs: Mapping[str, float]) -> dict[str, float]:
    """The shares of valid programs by the digit they ask for."""
    return {
        kind: sum(share for text, share in programs.items() if f'custom("{kind.upper()}' in text)
        for kind in KINDS
    }


def test_lessons_are_prompts_of_play_with_their_replies() -> None:
    lessons = _Lessons(random.Random(0))
    for made in (lessons.answer, lessons.design, lessons.letter):
        prompt, replies = made()
        assert sum(share for _, share in replies) == pytest.approx(1.0)
        assert max(len(tokens) for tokens, _ in replies) <= LONGEST and len(prompt) + LONGEST < 512
    (asked,) = {len(replies) for _, replies in (lessons.letter() for _ in range(20))}
    assert asked == len(KINDS) and all(len(tokens) == 1 for tokens, _ in lessons.letter()[1])
    # two replies of two tokens, half and half, at a loss of 1 nat per token: 2 - ln 2 above the
    # teacher
    assert excess(1.0, [([0], [([1, 2], 0.5), ([3, 4], 0.5)])]) == pytest.approx(
        2 - 0.693147, abs=1e-6
    )


def test_the_recipes_workflow_is_the_tiny_one_and_its_programs_are_worth_what_they_should() -> None:
    """Every program of the grammar, with an executor that is always right, or always wrong unless
    it takes care."""
    system = build_system(
        yaml.safe_load((ROOT / "recipes" / "scoreflow.yaml").read_text())["system"]
    )
    assert isinstance(system, Workflow) and system.arguments() == tiny_workflow().arguments()
    assert [(a.name, a.prompt, a.policy) for a in system.specs] == [
        ("designer", DESIGN, "designer"),
        ("executor", DO, "base"),
    ]

    def output(program: str, careless: bool) -> str:
        def answer(agent: str, messages: tuple[Message, ...]) -> str:
            text = messages[-1].content
            if agent == "designer":
                return program
            instruction, problem = text[:-4], text[-4:]
            return list(execute(instruction, problem))[-1 if careless else 0]

        team = fake_team(system.specs, answer, execute=sandboxed)
        return asyncio.run(system.run(Task("b472", "b472"), team))

    assert [output(form.replace("K", "B"), False) for form in FORMS] == ["6", "6"]
    assert [output(form.replace("K", "B"), True) for form in FORMS] == ["7", "6"]
    assert output(BROKEN.replace("K", "B"), False) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them() -> None:
    from transformers import AutoModelForCausalLM

    found = shares(AutoModelForCausalLM.from_pretrained(tiny_programs_model()))
    print(found)
    assert found["in grammar"] > 0.97 and found["careful"] > 0.97, found
    assert found["asks right"] == pytest.approx(ASKED, abs=0.03) and found["asks anew"] >= 0.85, (
        found
    )
    assert found["careless"] == pytest.approx(2 / 3, abs=0.06) and found["broken"] == pytest.approx(
        0.1, abs=0.04
    ), found
