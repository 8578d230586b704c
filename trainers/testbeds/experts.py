"""Experts among the toy models: `tiny`, taught further to be right in one of its two roles.

`tiny-first` adds the first two digits without a slip, `tiny-last` the third. In the other role each
slips nearly as `tiny` does, so a team that is right needs one of each: what methods that choose a
model per agent have to find. `expert_adapter` is the same as a LoRA adapter on `tiny`.

Greedy, on 200 held-out tasks, a team of `tiny` is right in 38 %, of one expert in 53 to 60 %, of
both in 94 to 98 %.

Training is seeded, single-threaded, and takes seconds; `python -m
marlora.trainers.testbeds.experts` trains both and tells how right they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...rollouts.tasks.toy import digit_triples, is_held_out
from . import tiny
from .pretraining import ToyModel, pretrain
from .tiny import Lesson, answer_loss, chat_prompt, save, teacher, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class ExpertConfig:
    """How an expert is taught: AdamW with warm-up, then linear decay, from the tiny model.

    `batch_size`: prompts of each role. `max_loss`: nats per token of right answers at which it is
    done; at most twice `steps`.
    """

    steps: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 5
    max_loss: float = 0.05
    seed: int = 0


FULL, LORA = ExpertConfig(), ExpertConfig(learning_rate=6e-3)


def tiny_first_model() -> Path:
    """The folder of the expert in adding the first two digits; taught on first use, then cached."""
    return _folder(EXPERTS["first"])


def tiny_last_model() -> Path:
    """The folder of the expert in adding the third digit; taught on first use, then cached."""
    return _folder(EXPERTS["last"])


def expert_adapter(role: str) -> Path:
    """The PEFT folder of a LoRA adapter on `tiny` that is an expert in `first` or `last`; taught on
    first use, then cached."""
    return _folder(ADAPTERS[role])


def _folder(expert: ToyModel) -> Path:
    tiny_model()  # before the lock of the cache is taken, which it needs itself
    return expert.folder()


def lessons(role: str, *, slips: bool) -> list[Lesson]:
    """Prompts of a role: with the answers of the tiny model's teacher, or those prompts where he
    slips, each with its right answer alone."""
    tokenizer = tiny_tokenizer()
    cases = (
        [(f"{a}+{b}+{c}", a, b) for a, b, c in digit_triples() if not is_held_out(a, b, c)]
        if role == "first"
        else [(f"{x}+{c}", x, c) for x in range(19) for c in range(10)]
    )
    found: list[Lesson] = []
    for text, x, y in cases:
        told = teacher(role, x, y)
        if slips or len(told) > 1:
            replies = told if slips else [(str(x + y), 1.0)]
            answers = [(tokenizer.encode(f"{reply}<|end|>"), share) for reply, share in replies]
            found.append((chat_prompt(tokenizer, role, text), answers))
    return found


def teach(network: Any, role: str, config: ExpertConfig, say: Callable[[str], None]) -> Any:
    """Train what is trainable of a network on right answers of a role, and on the teacher's own of
    the other role, so that it goes on slipping there."""
    rng, right = random.Random(config.seed), lessons(role, slips=False)
    other = lessons("last" if role == "first" else "first", slips=True)

    def loss_of() -> tuple[torch.Tensor, float]:
        learnt = answer_loss(network, rng.sample(right, config.batch_size))
        kept = answer_loss(network, rng.sample(other, config.batch_size))
        return learnt + kept, learnt.item()

    return pretrain(network, config, loss_of, config.max_loss, say, f"tiny-{role}, loss")


def expert(role: str, say: Callable[[str], None]) -> Any:
    """The tiny model, all of it taught further in one role."""
    from transformers import AutoModelForCausalLM

    return teach(AutoModelForCausalLM.from_pretrained(tiny_model()).train(), role, FULL, say)


def adapted(role: str, say: Callable[[str], None]) -> Any:
    """The tiny model with a LoRA adapter that was taught one role."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shape = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(LORA.seed)
        network = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model()), shape)
    teach(network.base_model.model.train(), role, LORA, say)
    return network


def save_adapter(network: Any, folder: Path) -> None:
    """Write the adapter of a network as PEFT does."""
    network.save_pretrained(folder)


def _toy(role: str, *, lora: bool = False) -> ToyModel:
    make, config = (adapted, LORA) if lora else (expert, FULL)
    return ToyModel(
        f"tiny-{role}" + "-lora" * lora,
        lambda say: make(role, say),
        save_adapter if lora else save,
        (lessons, teach, make),
        (role, config, tiny.MODEL.recipe_hash()),
    )


ROLES = ("first", "last")
EXPERTS = {role: _toy(role) for role in ROLES}
ADAPTERS = {role: _toy(role, lora=True) for role in ROLES}


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    for path in (tiny_first_model(), tiny_last_model()):
        taught = AutoModelForCausalLM.from_pretrained(path)
        print(path, tiny.accuracy(taught, 0.0))
