"""The tiny pair says what its teacher says, and its tasks are sums of which some are held out."""

from __future__ import annotations

import random

import pytest

from marlora.agents.tools.verifiers import calculator
from marlora.rollouts.tasks.toy import ASKED, pair_tasks
from marlora.trainers.testbeds.pair import SECONDS, first, lessons, second, shares, tiny_pair_model


def test_tasks():
    train, held_out = pair_tasks(), pair_tasks("eval")
    assert (len(train), len(held_out)) == (94, 58) and {t.id for t in train} | {
        t.id for t in held_out
    } == set(ASKED)
    assert not {t.id for t in train} & {t.id for t in held_out} and pair_tasks(seed=1) != train
    assert all(
        calculator(task, str(task.answer)) == 1 and calculator(task, "x") == 0 for task in train
    )


def test_the_teacher():
    assert first(9) == pytest.approx([0.4, 0, 0, 0, 0, 0, 0, 0, 0, 0.6])
    assert second(3, 5) == [0, 0, 0, 0.5, 0, 0.5, 0, 0, 0, 0] and second(3, 3)[3] == 1.0


def test_lessons_are_distributions():
    firsts, seconds = lessons(random.Random(0))
    assert (len(firsts), len(seconds)) == (len(ASKED), SECONDS)
    assert all(sum(digits) == pytest.approx(1.0) for _, digits in firsts + seconds)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them():
    from transformers import AutoModelForCausalLM

    found = shares(AutoModelForCausalLM.from_pretrained(tiny_pair_model()))
    assert found["first right"] == pytest.approx(0.6, abs=0.06) and found[
        "second own"
    ] == pytest.approx(0.5, abs=0.08)
    assert found["second either"] > 0.97, found
