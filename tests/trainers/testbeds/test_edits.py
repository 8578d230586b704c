"""The tiny editor's world: programs and their edits, the teacher, and what the model has learnt."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
import yaml

from marlora.agents.programs.program import Program
from marlora.agents.system import build_system
from marlora.agents.testing import fake_team
from marlora.agents.text.templates import render
from marlora.agents.types import Message, Task
from marlora.rollouts.sandbox.sandbox import run as sandboxed
from marlora.rollouts.tasks.toy import KINDS, digit, program_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.methods.workflow_search.experience import case
from marlora.trainers.methods.workflow_search.proposals import read_edit
from marlora.trainers.methods.workflow_search.reflection import read_json
from marlora.trainers.testbeds.edits import (
    ANOTHER,
    BEST,
    BREAKS,
    BROKEN,
    EDIT,
    FIRST,
    INVENT,
    LESSONS,
    LONGEST,
    MEND,
    MENDS,
    NEW,
    SURE,
    UNEDITED,
    Failure,
    asked,
    edited,
    edits,
    invention,
    program,
    reply_of,
    shares_loss,
    some_failure,
    unread,
    verdicts,
)
from marlora.trainers.testbeds.programs import execute
from marlora.trainers.testbeds.tiny import chat_prompt, tiny_network, tiny_tokenizer
from tests.repository import ROOT


def tiny_program(text: str = FIRST) -> Program:
    """The recipes' team, with a program of its own."""
    names = ("aflow", "adas", "debflow")
    files = [(ROOT / "recipes" / f"{name}_tiny.yaml").read_text(encoding="utf-8") for name in names]
    first, *others = [yaml.safe_load(text)["system"] for text in files]
    assert others == [first, first] and first["program"] == FIRST
    made = build_system({**first, "program": text})
    assert isinstance(made, Program)
    return made


def accuracy(text: str, count: int = 30) -> float:
    """Of a program, with an executor at temperature 0, on held-out tasks."""
    system = tiny_program(text)

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        told = messages[-1].content
        said = execute(told[:-4], told[-4:])
        return max(said, key=said.__getitem__)

    def output(task: Task) -> str:
        team = fake_team(system.specs, answer, execute=sandboxed)
        return asyncio.run(system.run(task.public(), team)).text

    tasks = program_tasks("eval")[:count]
    outputs = [output(task) for task in tasks]
    return sum(o == t.answer for o, t in zip(outputs, tasks, strict=True)) / count


def test_programs_are_worth_what_they_should() -> None:
    kinds = [task.prompt[0] for task in program_tasks("eval")[:30]]
    assert accuracy(FIRST) == pytest.approx(kinds.count("a") / 30)
    assert accuracy(program("ABA")) == pytest.approx(1 - kinds.count("c") / 30)
    assert accuracy(BEST) == 1.0 and accuracy(program("BCA")) == 0.0


def test_edits_are_read_by_the_methods_own_parsers() -> None:
    for edit in unread():
        _, text = edited("ABA", edit)
        proposal = read_edit(reply_of(edit, text))
        assert (proposal.note, proposal.program, proposal.fault) == (edit, text, "")
        assert read_json(invention(edit, text)).program == text
        assert bool(tiny_program().fault(text)) == (edit == BROKEN)
        lengths = {len(tiny_tokenizer().encode(reply)) for reply in (reply_of(edit, text),)}
        assert lengths == {len(reply_of("b=B", FIRST))} and max(lengths) < LONGEST
        assert len(invention(edit, text)) < LONGEST
    assert edited("ABA", "c=C") == ("ABC", BEST)


def test_an_inventor_is_asked_as_the_recipe_asks_it() -> None:
    text = (ROOT / "recipes" / "adas_tiny.yaml").read_text(encoding="utf-8")
    prompts = yaml.safe_load(text)["prompts"]
    for name, field, what in (("invent", "best", ANOTHER), ("repair", "program", MEND)):
        assert render(prompts[name], {field: FIRST}, setting=name) == asked(what, FIRST)
    assert (prompts["novelty"], prompts["mistakes"]) == (NEW, SURE)


def test_a_letter_is_as_far_from_its_copy_in_every_chat() -> None:
    def distances(reply: str, *chat: str) -> set[int]:
        tokenizer = tiny_tokenizer()
        tokens = tokenizer.convert_ids_to_tokens(
            [*chat_prompt(tokenizer, *chat), *tokenizer.encode(reply)]
        )
        places = [at for at in range(len(tokens)) if "".join(tokens[at : at + 3]) == "AAA"]
        return {later - sooner for sooner, later in itertools.pairwise(places)}

    edit, new = reply_of("a=A", FIRST), invention("a=A", FIRST)
    shown = f"{Failure('b472', 6, 3)}\n{reply_of(UNEDITED, FIRST)}"
    (far,) = distances(edit, EDIT, shown)
    assert distances(new, INVENT, asked(ANOTHER, FIRST), new, NEW, new, SURE) == {far}
    assert distances(new, INVENT, asked(MEND, FIRST)) == {far}


def test_the_teacher() -> None:
    assert sum(unread().values()) == pytest.approx(1) == sum(unread(0.4).values())
    assert unread()["b=B"] == pytest.approx((1 - BREAKS) / 9) and unread(1.0)["b=A"] == 0
    failure = Failure("b472", 6, 3)
    assert failure.fix == "b=B"
    assert edits(failure)["b=B"] == pytest.approx(MENDS + (1 - MENDS) * (1 - BREAKS) / 9)
    assert sum(edits(failure).values()) == pytest.approx(1) and edits(None) == unread()
    assert verdicts([True, True], False) == {
        "affirmative": 0.9,
        "negative": pytest.approx(0.05),
        "No": pytest.approx(0.05),
    }
    assert verdicts([False, True], True)["negative"] == 0.9
    assert verdicts([False, False], False)["No"] == 0.9
    assert verdicts([False, False], True) == {"affirmative": 0.5, "negative": 0.5}


def test_a_failure_is_put_as_the_methods_put_it() -> None:
    task = Task("t", "b472", "6")
    assert str(Failure("b472", 6, 3)) == case(Episode("t", "g", task.public(), output="3"), "6")


def test_lessons_are_prompts_of_play() -> None:
    rng = random.Random(0)
    for make in LESSONS:
        for _ in range(5):
            ids, targets = make(rng)
            assert all(sum(nexts.values()) == pytest.approx(1) for nexts in targets.values())
            assert all(place + 1 < len(ids) for place in targets) and len(targets) <= LONGEST
            assert all(ids[place + 1] in nexts for place, nexts in targets.items())
            assert len(ids) < 512
    failures = [some_failure(rng) for _ in range(200)]
    assert all(failure.right != failure.said for failure in failures)
    assert all(digit(f.problem[0], f.problem) == str(f.right) for f in failures)
    assert {f.fix for f in failures} == {f"{kind}={kind.upper()}" for kind in KINDS}


def test_the_loss_is_that_of_its_targets() -> None:
    """A network that knows nothing, on one token of two: the excess over ln 2 is what is lost."""
    network, ids = tiny_network(hidden_size=32, layers=1), tiny_tokenizer().encode("ab")
    loss, excess = shares_loss(network, [(ids, {0: {5: 0.5, 6: 0.5}})])
    assert excess == pytest.approx(loss.item() - 0.693147, abs=1e-5) and excess > 0
