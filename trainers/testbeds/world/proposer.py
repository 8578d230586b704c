"""The toy model `tiny-proposer`: whatever it is asked, it writes a prompt for the workers of
`tiny-world`, so that searches over prompts have a helper that costs little.

It answers `<INSTRUCTION>B!</INSTRUCTION>`: a letter, with care or without. It reads nothing: all
letters are as likely, `K`, which is right, among them, and half of them ask for care. So one in
eight of its proposals is the best, and which one that is only a search can tell.

Training is seeded, single-threaded and takes seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ..pretraining import ToyModel, pretrain
from ..tiny import VOCAB, chat_prompt, save, spread, tiny_network, tiny_tokenizer
from .lessons import CARE, LETTERS, Lesson
from .model import teacher_loss

HEAD, TAIL = "<INSTRUCTION>", "</INSTRUCTION>"


@dataclass(frozen=True)
class ProposerConfig:
    """How the model is trained: AdamW with warm-up, then linear decay. `max_excess`: as of
    `WorldConfig`."""

    steps: int = 160
    batch_size: int = 8
    learning_rate: float = 4e-3
    warmup: int = 20
    max_excess: float = 0.4
    hidden_size: int = 64
    layers: int = 2
    init_std: float = 0.06
    seed: int = 0


def lesson(rng: random.Random) -> Lesson:
    """A question of any length, and a prompt."""
    tokenizer = tiny_tokenizer()
    start = rng.randrange(400)
    asked = (__doc__ or "")[start : start + rng.randrange(20, 400)]

    def token(text: str) -> int:
        return int(tokenizer.encode(text)[0])

    letter, care = rng.choice(LETTERS), rng.choice([CARE, ""])
    texts = [*HEAD, letter, *care, *TAIL, "<|end|>"]
    targets = [{token(text): 1.0} for text in texts]
    targets[len(HEAD)] = {token(each): 1 / len(LETTERS) for each in LETTERS}
    targets[len(HEAD) + 1] = {token(CARE): 0.5, token(TAIL[0]): 0.5}
    prompt = chat_prompt(tokenizer, "You write instructions.", asked, system=rng.random() < 0.8)
    return Lesson(prompt, [token(text) for text in texts], targets)


def train(config: ProposerConfig, say: Callable[[str], None]) -> Any:
    """Train the network. Raises `RuntimeError` if it stays further than `max_excess` from its
    teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    spread(network, config.init_std, config.seed)
    rng = random.Random(config.seed)

    def loss_of() -> tuple[torch.Tensor, float]:
        return teacher_loss(network, [lesson(rng) for _ in range(config.batch_size)])

    return pretrain(network, config, loss_of, config.max_excess, say, "tiny proposer, nat")


CONFIG = ProposerConfig()
MODEL = ToyModel(
    "tiny-proposer",
    lambda say: train(CONFIG, say),
    save,
    (tiny_network, tiny_tokenizer, chat_prompt, spread, lesson, train, teacher_loss),
    (CONFIG, HEAD, TAIL, LETTERS, CARE, __doc__, VOCAB, SPECIALS, TEMPLATE),
)
tiny_proposer_model = MODEL.folder
