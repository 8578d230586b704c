"""The toy model that proposes prompts: its lessons, and that it keeps to them."""

from __future__ import annotations

import random
import re

import pytest

from marlora.trainers.testbeds.tiny import answers, chat_prompt, tiny_tokenizer
from marlora.trainers.testbeds.world.proposer import HEAD, TAIL, lesson, tiny_proposer_model

PROMPT = re.compile(rf"{HEAD}([ABCK])(!?){TAIL}")


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
    """Of 200 proposals to a question that it has not seen, nearly all are prompts; a quarter are
    `K`, half ask for care."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_proposer_model())
    asked = chat_prompt(tiny_tokenizer(), "You propose.", "Write a better instruction. " * 6)
    said = answers(network, [asked] * 200, 1.0, 1, len(HEAD) + len(TAIL) + 3)
    found = [match for text in said if (match := PROMPT.fullmatch(text))]
    assert len(found) > 180
    assert sum(match[1] == "K" for match in found) / len(found) == pytest.approx(0.25, abs=0.12)
    assert sum(match[2] == "!" for match in found) / len(found) == pytest.approx(0.5, abs=0.15)
