"""The tiny model that debates and haggles: what its teacher does, and that it does the same."""

from __future__ import annotations

import pytest
import torch

from marlora.agents.patterns.debate import Debate, quote
from marlora.agents.types import Turn
from marlora.rollouts.tasks.toy import digit_tasks
from marlora.trainers.testbeds import talk
from marlora.trainers.testbeds.talk import (
    BUYER,
    SEATS,
    SELLER,
    SOLVE,
    Distribution,
    alone,
    others_said,
    price,
    revised,
    tiny_talk_model,
)

torch.set_num_threads(1)


def test_first_answers_slip_to_both_sides() -> None:
    assert alone(9) == [0.25, 0, 0, 0, 0, 0, 0, 0, 0.2, 0.55]


def test_second_answers_follow_the_majority() -> None:
    """Three answers 3, 3, 4 to a task whose answer is 4: .85 for 3, and .15 of what it would say
    alone (3: .2, 4: .55, 5: .25)."""
    assert revised(4, [3, 3, 4]) == pytest.approx(
        [0, 0, 0, 0.85 + 0.03, 0.0825, 0.0375, 0, 0, 0, 0]
    )
    assert revised(4, [3, 5, 4]) == pytest.approx(
        [0, 0, 0, 0.85 / 3 + 0.03, 0.85 / 3 + 0.0825, 0.85 / 3 + 0.0375, 0, 0, 0, 0]
    )


def test_prices_never_lose() -> None:
    assert price(SELLER, 8) == [0, 0, 0, 0, 0, 0, 0, 0, 0.5, 0.5]
    assert price(BUYER, 1) == [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0]


def test_it_is_told_what_a_debate_tells() -> None:
    turns = [Turn(n, name, text=str(n + 4)) for n, name in enumerate(SEATS)]
    assert others_said(1, [4, 5, 6]) == quote([turns[0], turns[2]])
    assert [first for first, _ in Debate([*SEATS, "c1", "c2", "c3"], critics=True).seats] == list(
        SEATS
    )


def test_tasks_are_split() -> None:
    train, held_out = digit_tasks("train"), digit_tasks("eval", seed=1)
    assert len(train) + len(held_out) == 1000 and len(train) > 450 < len(held_out)
    assert not {t.id for t in train} & {t.id for t in held_out}
    assert all(task.answer == task.prompt[1] for task in train)


@pytest.mark.slow
def test_the_model_answers_as_its_teacher() -> None:
    """Roughly: its training is short. Mean distance (total variation) of first answers, prices, and
    second answers where two agree."""
    from transformers import AutoModelForCausalLM

    network, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_talk_model()),
        talk.tiny_tokenizer(),
    )
    ids = talk.digit_ids()

    @torch.no_grad()
    def distance(teacher: Distribution, *said: str) -> float:
        roles = ["system", *("user" if n % 2 == 0 else "assistant" for n in range(len(said) - 1))]
        chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        probs = network(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)[ids]
        return float((probs - torch.tensor(teacher)).abs().sum() / 2)

    tasks = digit_tasks("eval")[:60]
    first = [distance(alone(int(t.answer)), SOLVE, t.prompt) for t in tasks]
    haggling = [
        distance(price(role, n), role, f"{n} {'-' if role == SELLER else 5}")
        for role in (SELLER, BUYER)
        for n in range(10)
    ]
    second = []
    for n, task in enumerate(tasks):
        answers = [int(task.answer), int(task.answer), (int(task.answer) + 1) % 10]
        second.append(
            distance(
                revised(int(task.answer), answers),
                SOLVE,
                task.prompt,
                str(answers[n % 3]),
                others_said(n % 3, answers),
            )
        )
    means = [sum(found) / len(found) for found in (first, haggling, second)]
    print(means)
    assert means[0] < 0.17 and means[1] < 0.27 and means[2] < 0.35, means
