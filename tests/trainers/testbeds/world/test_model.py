"""The toy model that plays every role: its teacher's shares by hand, its lessons, and that the
models have learnt them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from marlora.rollouts.tasks.toy import program_tasks
from marlora.trainers.testbeds.tiny import answers, chat_prompt, tiny_network, tiny_tokenizer
from marlora.trainers.testbeds.world import model as world
from marlora.trainers.testbeds.world.lessons import (
    Lessons,
    asked_answer,
    design,
    instructions,
    own_share,
    work,
    workflow,
)

ROLES = [*world.COUNTS]


def test_what_an_instruction_asks_for() -> None:
    """472: 2 + 7 = 9 as of kind c; 2 + 4 by `B`; 2 + 2 by a prompt that is wrong for c."""
    assert [asked_answer(i, "c472") for i in ("C", "K!", "B", "a1b4c2")] == ["9", "9", "6", "4"]
    assert asked_answer("a1b7c2", "a479") == "0", "the sum is mod 10"


def test_a_worker_alone() -> None:
    """A wrong prompt: .7 by it, .3 right. A slip is possible from 5 on: .6, with care .25 up to 7."""
    assert work("a1b7c2", "c472") == pytest.approx({"4": 0.7, "9": 0.3})
    assert work("a1b4c7", "c476") == pytest.approx({"3": 0.4, "4": 0.6})
    assert work("K!", "c476") == pytest.approx({"3": 0.75, "4": 0.25})
    assert work("K!", "c478") == pytest.approx({"5": 0.4, "6": 0.6}), "care does not help here"
    both = {"8": 0.7 * 0.4, "9": 0.7 * 0.6, "3": 0.3 * 0.4, "4": 0.3 * 0.6}
    assert work("a1b7c2", "c476") == pytest.approx(both)


def test_a_worker_after_examples() -> None:
    """A right one makes the odds .3 : .7 eight times as good, .774194; a wrong one undoes it."""
    right, wrong = ("b123", "7"), ("b123", "0")
    assert own_share([right]) == pytest.approx(0.774194, abs=1e-6)
    assert own_share([right, wrong]) == pytest.approx(0.3)
    assert own_share([wrong]) == pytest.approx(0.3 / (0.3 + 0.7 * 8))
    assert work("a1b7c2", "c472", examples=[right, right])["9"] == pytest.approx(0.964824, abs=1e-6)


def test_a_worker_among_others() -> None:
    """.65 for what most say, shared where two are said as often; the rest as if alone."""
    assert work("K", "c472", ["5", "5", "9"]) == pytest.approx({"9": 0.35, "5": 0.65})
    assert work("K", "c472", ["5", "9"]) == pytest.approx({"9": 0.675, "5": 0.325})


def test_an_expert_goes_by_nothing_else() -> None:
    assert work("a1b7c2", "c478", ["1", "1"], expert="c") == {"5": 1.0}
    assert work("a1b7c2", "b472", ["1"], expert="c") == work("a1b7c2", "b472", ["1"])


def test_designers() -> None:
    """Told a kind, .3 of what they ask for is right and .15 right for all; of programs a tenth
    cannot be run. After `0/2` with B, B has a twentieth of its weight."""
    asked = instructions("c")
    assert asked["C"] + asked["C!"] == pytest.approx(0.3)
    assert asked["A"] + asked["A!"] == pytest.approx(0.4), "the kind after c"
    assert asked["K!"] == pytest.approx(0.15 * 0.35)
    first = design("c")
    assert first['await custom("K!")'] == pytest.approx(0.9 * 0.15 * 0.35)
    assert sum(share for text, share in first.items() if "magic" in text) == pytest.approx(0.1)
    second = design("c", [('await custom("B")', "0/2")])
    total = 1 - 0.95 * 0.9 * 0.15
    assert second['await custom("C")'] == pytest.approx(0.9 * 0.3 * 0.65 / total)
    assert second['await custom("B")'] == pytest.approx(0.05 * 0.9 * 0.15 * 0.65 / total)
    flows = workflow("k")
    assert flows["1:::process:::K:::next::2\n2:::terminal"] == pytest.approx(0.9 * 0.15 * 0.65)
    assert all(sum(each.values()) == pytest.approx(1) for each in (first, second, flows))


@pytest.mark.parametrize("role", ROLES)
def test_lessons_are_distributions(role: str) -> None:
    """Every token of the reply that was drawn may stand where it stands."""
    lessons = Lessons(random.Random(3), letters=0.5)
    for _ in range(20):
        lesson = getattr(lessons, role)()
        assert len(lesson.reply) == len(lesson.targets)
        for token, shares in zip(lesson.reply, lesson.targets, strict=True):
            assert shares[token] > 0 and sum(shares.values()) == pytest.approx(1)
        assert tiny_tokenizer().decode(lesson.reply).endswith("<|end|>")


def test_the_loss_of_a_network_that_knows_nothing() -> None:
    """Logits of 0: each place costs ln 264, and exceeds the teacher's entropy by what that is less.
    Of a certain reply of two tokens that is 2 ln 264 = 11.152; the loss is that by root two."""
    import torch

    network = tiny_network(hidden_size=32, layers=1)
    with torch.no_grad():
        network.lm_head.weight.zero_()
    lesson = Lessons(random.Random(0)).of({"7": 1.0}, "a1b4c7", "a476")
    loss, excess = world.teacher_loss(network, [lesson, lesson])
    assert loss.item() == pytest.approx(11.1519 / 2**0.5, abs=1e-3)
    assert excess == pytest.approx(11.1519, abs=1e-3)
    even = Lessons(random.Random(0)).of({"7": 0.5, "8": 0.5}, "a1b4c7", "a476")
    assert world.teacher_loss(network, [even])[1] == pytest.approx(11.1519 - 0.6931, abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_has_learnt_them() -> None:
    """Roughly: a prompt counts, care counts, and it follows others; the file has the numbers."""
    found = _shares(world.tiny_world_model())
    assert found["wrong prompt"] < 0.6 < found["careful prompt"], found
    assert found["wrong prompt"] + 0.08 < found["right prompt"] < found["careful prompt"], found
    assert found["careful"] > found["careless"] + 0.08, found
    assert found["follows"] > 0.5, found
    assert found["programs"] > 0.9 and found["workflows"] > 0.9, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_expert_has_learnt_its_kind() -> None:
    """Under the wrong prompt it is right in more problems of its kind than the model that it was
    taught from."""
    before, after = (
        _right(model(), "c") for model in (world.tiny_world_model, world.tiny_world_c_model)
    )
    assert after > before + 0.08, (before, after)


def _right(folder: Path, kind: str) -> float:
    """The share of problems of a kind that are answered right at temperature 0 under the prompt
    that is wrong for them."""
    from transformers import AutoModelForCausalLM

    tasks = [task for task in program_tasks("eval") if task.prompt[0] == kind]
    prompts = [chat_prompt(tiny_tokenizer(), world.WRONG, task.prompt) for task in tasks]
    said = answers(AutoModelForCausalLM.from_pretrained(folder), prompts, 0.0, 1, 2)
    return sum(a == task.answer for a, task in zip(said, tasks, strict=True)) / len(tasks)


def _shares(folder: Path) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    return world.shares(AutoModelForCausalLM.from_pretrained(folder))
