"""The toy model that goes by worked examples: its teacher's shares by hand, its tasks, and that the
model has learnt them."""

from __future__ import annotations

import random

import pytest

from marlora.rollouts.tasks.toy import rule_tasks
from marlora.trainers.testbeds.rules import (
    LESSONS,
    answer,
    lessons,
    posterior,
    rule_chain,
    shares,
    tiny_rules_model,
)


def test_tasks() -> None:
    """472: first says 2 // 2 + 5 = 6, last 6 // 2 + 0 = 3. No other pair of ways ends there."""
    train, held_out = rule_tasks(), rule_tasks("eval")
    assert len(train) + len(held_out) == 1000 and not {t.id for t in train} & {
        t.id for t in held_out
    }
    (task,) = [t for t in train + held_out if t.id == "472"]
    assert task.answer == "3" and task.meta == {"_first": "6"} and not task.public().meta
    for task in train:
        half = int(task.prompt) % 10 // 2
        ends = {(a, b): (half + a) // 2 + b for a in (0, 5) for b in (0, 5)}
        assert [ways for ways, end in ends.items() if str(end) == task.answer] == [(5, 0)]


def test_the_teacher() -> None:
    """Prior .7 against .3; one example of the other way makes it .7 : .3 x 20, .104478 : .895522;
    one of each leaves the prior."""
    assert posterior("first", []) == pytest.approx({0: 0.7, 5: 0.3})
    assert posterior("last", []) == pytest.approx({0: 0.3, 5: 0.7})
    assert posterior("first", [(2, 6)]) == pytest.approx({0: 0.104478, 5: 0.895522}, abs=1e-6)
    assert posterior("first", [(2, 6), (4, 2)]) == pytest.approx({0: 0.7, 5: 0.3})
    assert answer("first", 7, [(2, 6)])[8] == pytest.approx(0.895522, abs=1e-6)
    assert sum(answer("last", 9)) == pytest.approx(1.0)


def test_lessons_are_distributions() -> None:
    none, some = lessons(random.Random(0))
    assert (len(none), len(some)) == (800, LESSONS)
    assert all(sum(digits) == pytest.approx(1.0) for _, digits in none + some)


def test_the_team_speaks_with_the_base_unless_told() -> None:
    assert [a.policy for a in rule_chain().specs] == ["base", "base"]
    assert [a.policy for a in rule_chain({"last": "last"}).specs] == ["base", "last"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_them() -> None:
    from transformers import AutoModelForCausalLM

    found = shares(AutoModelForCausalLM.from_pretrained(tiny_rules_model()))
    assert found["none"] < 0.02 and found["none, sampled"] == pytest.approx(0.3, abs=0.1)
    assert found["one"] > 0.95 and found["four"] > 0.95, found
