"""The toy model `tiny-proposer`: whatever it is asked, it writes a prompt for the workers of
`tiny-world`, so that searches over prompts have a helper that costs little.

It answers `<INSTRUCTION>a1b7c4</INSTRUCTION>`, what to add for each kind of problem. It reads
nothing: each amount is right in `KNOWN` of its samples, which is what it has been taught of this
world as larger models have been of theirs, and any digit in the others. So a proposal is right for
all kinds in about a tenth of its samples, and which one that is only a search can tell.

Training is seeded, single-threaded and takes seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ....rollouts.tasks.toy import KINDS
from ..pretraining import ToyModel, pretrain
from ..tiny import VOCAB, chat_prompt, save, spread, tiny_network, tiny_tokenizer
from .lessons import Lesson
from .model import teacher_loss

KNOWN = 0.4  # share of amounts that are right by more than chance
HEAD, TAIL = "<INSTRUCTION>", "</INSTRUCTION>"


@dataclass(frozen=True)
class ProposerConfig:
    """How the model is trained: AdamW with warm-up, then linear decay. `max_excess`: as of
    `WorldConfig`."""

    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 4e-3
    warmup: int = 20
    max_excess: float = 0.15
    hidden_size: int = 64
    layers: int = 2
    init_std: float = 0.06
    seed: int = 0


def amount_shares(kind: str) -> dict[str, float]:
    """How often each digit is proposed for a kind."""
    return {str(d): (1 - KNOWN) / 10 + KNOWN * (d == KINDS[kind]) for d in range(10)}


def lesson(rng: random.Random) -> Lesson:
    """A question of any length, and a prompt."""
    tokenizer = tiny_tokenizer()
    start = rng.randrange(400)
    asked = (__doc__ or "")[start : start + rng.randrange(20, 400)]
    pieces: list[tuple[str, dict[str, float]]] = [(sign, {sign: 1.0}) for sign in HEAD]
    for kind in KINDS:
        shares = amount_shares(kind)
        (drawn,) = rng.choices([*shares], [*shares.values()])
        pieces += [(kind, {kind: 1.0}), (drawn, shares)]
    pieces += [(sign, {sign: 1.0}) for sign in TAIL]

    def token(text: str) -> int:
        return int(tokenizer.encode(text)[0])

    end = token("<|end|>")
    prompt = chat_prompt(tokenizer, "You write instructions.", asked, system=rng.random() < 0.8)
    reply = [token(sign) for sign, _ in pieces] + [end]
    targets = [{token(sign): share for sign, share in shares.items()} for _, shares in pieces]
    return Lesson(prompt, reply, [*targets, {end: 1.0}])


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
    (tiny_network, tiny_tokenizer, chat_prompt, spread, amount_shares, lesson, train, teacher_loss),
    (CONFIG, KNOWN, HEAD, TAIL, __doc__, KINDS, VOCAB, SPECIALS, TEMPLATE),
)
tiny_proposer_model = MODEL.folder
