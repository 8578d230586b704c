"""An expert is right in its role and slips in the other, as a base of its own and as an adapter.

Measured, greedy, team accuracy on 200 held-out tasks: tiny .385; one expert in both roles .555 to
.595 as a base, .53 to .555 as an adapter; each in its own .975 and .94; each in the other's .33 and
.31.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.tasks.toy import last_tasks
from marlora.trainers.testbeds.experts import (
    ROLES,
    expert_adapter,
    lessons,
    tiny_first_model,
    tiny_last_model,
)
from marlora.trainers.testbeds.tiny import accuracy, tiny_model, tiny_tokenizer


def test_lessons_are_right_where_the_tiny_model_slips() -> None:
    tokenizer = tiny_tokenizer()
    right, kept = lessons("last", slips=False), lessons("last", slips=True)
    assert (len(right), len(kept)) == (95, 190)  # sums 0 to 18 and third digits: 5 to 9, 0 to 9
    prompt, answers = right[0]
    assert tokenizer.decode(prompt).endswith("0+5<|end|><|assistant|>")
    assert [(tokenizer.decode(ids), share) for ids, share in answers] == [("5<|end|>", 1.0)]
    assert {len(answers) for _, answers in right} == {1}
    assert [sum(share for _, share in answers) for _, answers in kept] == pytest.approx([1.0] * 190)


def test_tasks_of_the_last_agent_alone() -> None:
    train, held_out = last_tasks(), last_tasks("eval")
    assert len(train) + len(held_out) == 190 and 50 < len(held_out) < 80
    assert not {t.prompt for t in train} & {t.prompt for t in held_out}
    assert last_tasks(seed=1) != train and {t.id for t in last_tasks(seed=1)} == {
        t.id for t in train
    }
    for task in train + held_out:
        x, c = task.prompt.split("+")
        assert task.answer == str(int(x) + int(c))


def _team(first: Any, last: Any) -> float:
    """Share of right answers of a team whose roles are played by two networks."""
    return accuracy(_Roles(first, last), 0.0)["team"]


class _Roles:
    """Two networks as one: the first is asked first (`accuracy` asks for all sums, then for all
    answers)."""

    def __init__(self, first: Any, last: Any) -> None:
        self.networks = {"first": first, "last": last}

    def __call__(self, input_ids: Any) -> Any:
        role = "first" if "first" in tiny_tokenizer().decode(input_ids[0]) else "last"
        return self.networks[role](input_ids=input_ids)


def _network(base: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base)
    return network if adapter is None else PeftModel.from_pretrained(network, adapter)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_team_of_both_is_right_and_a_team_of_one_is_not() -> None:
    base = _network(tiny_model())
    experts = {
        "base": {"first": _network(tiny_first_model()), "last": _network(tiny_last_model())},
        "lora": {role: _network(tiny_model(), expert_adapter(role)) for role in ROLES},
    }
    alone = {kind: {role: _team(e, e) for role, e in own.items()} for kind, own in experts.items()}
    both = {kind: _team(own["first"], own["last"]) for kind, own in experts.items()}
    swapped = {kind: _team(own["last"], own["first"]) for kind, own in experts.items()}
    told = f"tiny {_team(base, base)}, alone {alone}, both {both}, swapped {swapped}"
    print(told)
    assert min(both.values()) > 0.9, told
    assert max(max(own.values()) for own in alone.values()) < 0.75, told
    assert max(swapped.values()) < 0.45, told
