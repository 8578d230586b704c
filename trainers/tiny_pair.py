"""A tiny model for two that hear a verifier: it adds, slips, and then keeps its answer or takes the other's, whatever the verifier says.

Told `7+8+5`, it answers 20 in 60 % of its samples and 21 in 40 %, on every sum alike. Told then `-19+` (a verifier's sign on its own
answer, the other's answer, the sign on that), it answers again: its own answer or the other's, one as likely as the other. So a second
round is as good as the first and no better. What can be learnt is to believe the signs: then a second answer is right wherever one of
the two was, .84 (1 - .4 x .4) instead of .60. It has seen all sums; held out are tasks of the method, not of its pre-training.

The views of `agents/collaboration.py` for it are in `PAIR`. The target is the teacher's distribution itself; training is seeded,
single-threaded and takes about a minute on one core. `python -m marlora.trainers.tiny_pair` trains the model and tells how it answers.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..rollouts.engines.scripted import SPECIALS, TEMPLATE
from .tiny import VOCAB, Lesson, kept, lesson_loss, one_thread, tiny_network, tiny_tokenizer

RIGHT = 0.6  # share of first answers that are right; the others are one too many
LARGEST = 28  # of all answers
STRANGE = 0.3  # share of lessons in whose second round any two numbers stand, not two answers of the teacher
PAIR: dict[str, Any] = {
    "quote": "{answer}{verdict}",
    "revise": "{verdict}{others}",
    "verdict": "{words}",
    "words": ["-", "-", "+", "+"],
}


@dataclass(frozen=True)
class PairConfig:
    """How the model is trained: AdamW with warm-up, then linear decay to 5 % of `learning_rate`, on batches of so many first and second
    answers. Training goes on at the last rate, up to twice the steps, while the mean loss of the last 20 steps is above `max_loss`
    nat per answer token (the teacher's own is about 0.2)."""

    steps: int = 500
    firsts: int = 48
    seconds: int = 64
    learning_rate: float = 4e-3
    warmup: int = 50
    max_loss: float = 0.25
    seed: int = 0


def tiny_pair_model(cache: Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of `tiny_model`."""
    return kept(f"tiny-pair-{_recipe()}", lambda: train(PairConfig(), say or (lambda line: None)), cache)


def first(a: int, b: int, c: int) -> list[tuple[str, float]]:
    """The answers to a sum and how often the teacher gives each."""
    return [(str(a + b + c), RIGHT), (str(a + b + c + 1), 1 - RIGHT)]


def second(own: str, other: str) -> list[tuple[str, float]]:
    """The answers after the other was heard."""
    return [(own, 1.0)] if own == other else [(own, 0.5), (other, 0.5)]


def lesson(rng: random.Random, again: bool) -> tuple[list[str], list[tuple[str, float]]]:
    """What was said in a chat, user and assistant in turn, and the answers that may follow with their shares."""
    digits = [rng.randrange(10) for _ in range(3)]
    asked, answers = "+".join(map(str, digits)), first(*digits)
    if not again:
        return [asked], answers
    if rng.random() < STRANGE:
        own, other = (str(rng.randrange(LARGEST + 1)) for _ in range(2))
    else:
        own, other = rng.choices([text for text, _ in answers], [share for _, share in answers], k=2)
    return [asked, own, f"{rng.choice('+-')}{other}{rng.choice('+-')}"], second(own, other)


def train(config: PairConfig, say: Callable[[str], None]) -> Any:
    """Train the network. Raises `RuntimeError` if the loss stays above `max_loss`."""
    network, rng, tokenizer = tiny_network(seed=config.seed).train(), random.Random(config.seed), tiny_tokenizer()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    with one_thread():
        for step in range(2 * config.steps):
            rate = min(1, (step + 1) / config.warmup) * max(0.05, 1 - 0.95 * step / config.steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate
            made = [lesson(rng, again) for again, count in ((False, config.firsts), (True, config.seconds)) for _ in range(count)]
            loss = lesson_loss(network, [_encoded(tokenizer, *each) for each in made])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            recent = sum(losses[-20:]) / len(losses[-20:])
            if (step + 1) % 20 == 0:
                say(f"tiny pair: step {step + 1}/{config.steps}, loss {recent:.3f}")
            if step + 1 >= config.steps and recent <= config.max_loss:
                return network.eval()
    raise RuntimeError(f"tiny pair: loss {recent:.3f} after {2 * config.steps} steps, expected at most {config.max_loss}")


def _encoded(tokenizer: Any, said: list[str], answers: list[tuple[str, float]]) -> Lesson:
    chat = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(said)]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return prompt, [(tokenizer.encode(answer + "<|end|>"), share) for answer, share in answers]


def _recipe() -> str:
    """A hash of all that the trained weights follow from."""
    code = [inspect.getsource(part) for part in (tiny_network, tiny_tokenizer, first, second, lesson, train, lesson_loss, _encoded)]
    facts = (PairConfig(), RIGHT, LARGEST, STRANGE, VOCAB, SPECIALS, TEMPLATE)
    return hashlib.sha256("\n".join([*code, repr(facts)]).encode()).hexdigest()[:12]


if __name__ == "__main__":
    print(tiny_pair_model(say=lambda line: print(line, flush=True)))
