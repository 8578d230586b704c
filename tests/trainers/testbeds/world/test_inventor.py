"""The toy model that invents programs: its lessons, and that it keeps to them."""

from __future__ import annotations

import random
import re

import pytest
import torch

from marlora.agents.programs.program import Program
from marlora.agents.types import AgentSpec
from marlora.trainers.methods.workflow_search.reflection import read_json
from marlora.trainers.testbeds.world.inventor import inventor_tokenizer, lesson, tiny_inventor_model

CODE = re.compile(r"await custom\('([ABCK]{3})'\['abc'\.find\(problem\[0\]\)\]( \+ '!')?\)")


def test_a_lesson_is_a_program_in_json() -> None:
    """Programs can be run, but for those that call what does not exist."""
    target = Program([AgentSpec("executor", "", "do")], operators=["custom"])
    rng, tokenizer, broken = random.Random(0), inventor_tokenizer(), 0
    for _ in range(40):
        ids, targets = lesson(tokenizer, rng)
        for place, shares in targets.items():
            assert shares[ids[place + 1]] > 0 and sum(shares.values()) == pytest.approx(1)
        proposal = read_json(tokenizer.decode(ids[min(targets) + 1 : -1]))
        assert not proposal.fault
        broken += "wizard" in proposal.program
        assert CODE.fullmatch(proposal.program.replace("wizard", "custom"))
        assert bool(target.fault(proposal.program)) == ("wizard" in proposal.program)
    assert 0 < broken < 15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_has_learnt_to_invent() -> None:
    """After questions that it has not seen, also where it is asked again, each token of a program
    has about the teacher's share."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_inventor_model())
    rng, tokenizer = random.Random(9), inventor_tokenizer()
    for _ in range(30):
        ids, targets = lesson(tokenizer, rng)
        given = network(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        for place, shares in targets.items():
            for token, share in shares.items():
                assert float(given[place, token]) == pytest.approx(share, abs=0.2)
