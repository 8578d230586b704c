"""The tiny designer's tasks, its teacher, its workflow, and what it has learnt."""

from __future__ import annotations

import asyncio
import random

import pytest
import yaml

from marlora.agents.team import fake_team
from marlora.agents.types import Message, Task
from marlora.agents.workflow import Workflow
from marlora.rollouts.sandbox import run as sandboxed
from marlora.rollouts.served import build_system
from marlora.trainers.tiny_programs import (
    BROKEN,
    DESIGN,
    DO,
    FORMS,
    KINDS,
    LONGEST,
    _Lessons,
    design,
    digit,
    excess,
    execute,
    program_tasks,
    shares,
    tiny_programs_model,
    tiny_workflow,
)  # fmt: skip
from tests.repository import ROOT


def test_tasks() -> None:
    train, held_out = program_tasks(), program_tasks("eval")
    assert len(train) + len(held_out) == 3000 and not {t.id for t in train} & {t.id for t in held_out}
    assert program_tasks(seed=1) != train
    task = next(t for t in train if t.prompt.startswith("m"))
    assert task.answer == task.prompt[2] and digit("l", "f472") == "2"
    for task in train[:50]:
        assert [[len(p), p[0], digit(p[0], p)] for p, _ in task.meta["examples"]] == [
            [4, task.prompt[0], a] for _, a in task.meta["examples"]
        ]


def test_the_teacher() -> None:
    assert execute("m", "f472") == {"7": pytest.approx(2 / 3), "8": pytest.approx(1 / 3)} and execute("m!", "f472") == {"7": 1.0}
    first = design("m")
    asks = {kind: sum(share for text, share in first.items() if f'custom("{kind}' in text) for kind in KINDS}
    assert asks == {"f": pytest.approx(0.25), "m": pytest.approx(0.4), "l": pytest.approx(0.25)}
    assert sum(first.values()) == pytest.approx(1.0) and sum(
        share for text, share in first.items() if "magic" in text
    ) == pytest.approx(0.1)
    careful = 'await custom("K!")'
    assert design("m", [("f", careful, "2/2")])['await custom("f!")'] > 0.8
    assert design("m", [("m", careful, "0/2")])['await custom("m!")'] < first['await custom("m!")'] / 5
    assert max(design("m", [("f", BROKEN, "invalid")]).values()) > max(first.values())


def test_lessons_are_prompts_of_play_with_their_replies() -> None:
    lessons = _Lessons(random.Random(0))
    for made in (lessons.answer, lessons.design):
        prompt, replies = made()
        assert sum(share for _, share in replies) == pytest.approx(1.0)
        assert max(len(tokens) for tokens, _ in replies) <= LONGEST and len(prompt) + LONGEST < 512
    # two replies of two tokens, half and half, at a loss of 1 nat per token: 2 - ln 2 above the teacher
    assert excess(1.0, [([0], [([1, 2], 0.5), ([3, 4], 0.5)])]) == pytest.approx(2 - 0.693147, abs=1e-6)


def test_the_recipes_workflow_is_the_tiny_one_and_its_programs_are_worth_what_they_should() -> None:
    """Every program of the grammar, with an executor that is always right, or always wrong unless it takes care."""
    system = build_system(yaml.safe_load((ROOT / "recipes" / "scoreflow.yaml").read_text())["system"])
    assert isinstance(system, Workflow) and system.arguments() == tiny_workflow().arguments()
    assert [(a.name, a.prompt, a.policy) for a in system.specs] == [("designer", DESIGN, "designer"), ("executor", DO, "base")]

    def output(program: str, careless: bool) -> str:
        def answer(agent: str, messages: tuple[Message, ...]) -> str:
            text = messages[-1].content
            if agent == "designer":
                return program
            kind, rest = (text[0], text[2:]) if text[1] == "!" else (text[0], text[1:])
            return list(execute(text[: len(text) - len(rest)], f"{kind}{rest[1:]}"))[-1 if careless else 0]

        team = fake_team(system.specs, answer, execute=sandboxed)
        return asyncio.run(system.run(Task("m472", "m472"), team))

    assert [output(form.replace("K", "m"), False) for form in FORMS] == ["7", "7", "7"]
    assert [output(form.replace("K", "m"), True) for form in FORMS] == ["8", "7", "8"]
    assert output(BROKEN.replace("K", "m"), False) == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them() -> None:
    from transformers import AutoModelForCausalLM

    found = shares(AutoModelForCausalLM.from_pretrained(tiny_programs_model()))
    print(found)
    assert found["in grammar"] > 0.9 and found["careful"] > 0.9, found
    assert found["careless"] == pytest.approx(2 / 3, abs=0.1) and found["broken"] == pytest.approx(0.1, abs=0.06), found
