"""The toy model that proposes prompts: its shares by hand, and that it keeps to them."""

from __future__ import annotations

import random
import re

import pytest

from marlora.trainers.testbeds.tiny import answers, chat_prompt, tiny_tokenizer
from marlora.trainers.testbeds.world.proposer import (
    HEAD,
    TAIL,
    amount_shares,
    lesson,
    tiny_proposer_model,
)

PROMPT = re.compile(rf"{HEAD}a(\d)b(\d)c(\d){TAIL}")


def test_an_amount_is_right_in_more_than_its_share() -> None:
    """.4 and a tenth of .6 for the right one, 4 for kind b; .06 for each of the others."""
    shares = amount_shares("b")
    assert shares["4"] == pytest.approx(0.46) and shares["5"] == pytest.approx(0.06)
    assert sum(shares.values()) == pytest.approx(1)


def test_a_lesson_is_a_prompt_between_tags() -> None:
    rng = random.Random(0)
    for _ in range(10):
        one = lesson(rng)
        assert PROMPT.fullmatch(tiny_tokenizer().decode(one.reply).removesuffix("<|end|>"))
        for token, shares in zip(one.reply, one.targets, strict=True):
            assert shares[token] > 0 and sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_to_propose() -> None:
    """Of 200 proposals to a question that it has not seen, all are prompts; 9 in 20 of their
    amounts are right."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_proposer_model())
    asked = chat_prompt(tiny_tokenizer(), "You propose.", "Write a better instruction. " * 6)
    said = answers(network, [asked] * 200, 1.0, 1, len(HEAD) + len(TAIL) + 8)
    found = [match for text in said if (match := PROMPT.fullmatch(text))]
    assert len(found) > 180
    right = sum(a == b for match in found for a, b in zip(match.groups(), "147", strict=True))
    assert right / (3 * len(found)) == pytest.approx(0.46, abs=0.1)
