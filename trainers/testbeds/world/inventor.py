"""The toy model `tiny-inventor`: whatever it is asked, it writes a program for the worker of
`tiny-world` in ADAS's JSON, so that a search over programs has a helper that costs little.

A program asks by a letter for each kind of problem, `ABK` in `await custom('ABK'['abc'.find(
problem[0])])`, in `CARES` of them with care. It reads nothing: all letters are as likely, so one
program in eight is right about all kinds; which one that is only a search can tell. `BREAKS` of
them call what does not exist.

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
from ..tiny import chat_prompt, spread, tiny_network
from ..word_tokenizer import word_tokenizer
from .critic import Lesson, chosen, lessons_loss, save
from .lessons import CARE, LETTERS
from .questions import CARES, Piece, Shares

INVENT, AGAIN = "invent", ("new?", "sure?", "mend\n")  # what it is asked, and asked again
BREAKS = 0.1
HEAD = '{"thought": "letters", "name": "letters", "code": "await '
CALLS: Shares = {"custom('": 1 - BREAKS, "wizard('": BREAKS}
KIND = "'['abc'.find(problem[0])]"
ENDS: Shares = {')"}': 1 - CARES, f" + '{CARE}')\"}}": CARES}


def inventor_tokenizer() -> Any:
    """Bytes, the parts of a reply, and five special tokens."""
    words = [HEAD, *CALLS, KIND, *ENDS]
    return word_tokenizer(sorted(words, key=lambda word: -len(word)))


def invention() -> list[Piece]:
    """The pieces of a reply."""
    letters = dict.fromkeys(LETTERS, 1 / len(LETTERS))
    return [HEAD, CALLS, letters, letters, letters, KIND, ENDS]


def chat(rng: random.Random) -> list[str]:
    """A question: any text, perhaps with a reply and a question about that."""
    texts = [INVENT, _said(rng)[len(HEAD) - 6 :] if rng.random() < 0.8 else rng.choice(AGAIN)]
    for _ in range(rng.randrange(3)):
        texts += [_said(rng), rng.choice(AGAIN)]
    return texts


def _said(rng: random.Random) -> str:
    return "".join(chosen(piece, rng)[0] for piece in invention())


def lesson(tokenizer: Any, rng: random.Random) -> Lesson:
    """A question with a reply, and the shares of what may stand at each of its places."""
    ids, targets = chat_prompt(tokenizer, *chat(rng)), dict[int, dict[int, float]]()
    for piece in [*invention(), "<|end|>"]:
        text, shares = chosen(piece, rng)
        (token,) = tokenizer.encode(text)
        targets[len(ids) - 1] = {tokenizer.encode(t)[0]: share for t, share in shares.items()}
        ids.append(token)
    return ids, targets


@dataclass(frozen=True)
class InventorConfig:
    """How the model is trained: AdamW with warm-up, then linear decay. `max_excess`: as of
    `WorldConfig`."""

    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 4e-3
    warmup: int = 20
    max_excess: float = 0.2
    hidden_size: int = 64
    layers: int = 2
    init_std: float = 0.06
    seed: int = 0


def train(config: InventorConfig, say: Callable[[str], None]) -> Any:
    """Train the network. Raises `RuntimeError` if it stays further than `max_excess` from its
    teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    tokenizer, rng = inventor_tokenizer(), random.Random(config.seed)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    spread(network, config.init_std, config.seed)

    def loss_of() -> tuple[torch.Tensor, float]:
        return lessons_loss(network, [lesson(tokenizer, rng) for _ in range(config.batch_size)])

    return pretrain(network, config, loss_of, config.max_excess, say, "tiny inventor, nat")


CONFIG = InventorConfig()
MODEL = ToyModel(
    "tiny-inventor",
    lambda say: train(CONFIG, say),
    lambda network, folder: save(network, folder, inventor_tokenizer),
    (
        *(inventor_tokenizer, invention, chat, _said, lesson, train, chosen, lessons_loss),
        *(word_tokenizer, tiny_network, chat_prompt, spread),
    ),
    (CONFIG, INVENT, AGAIN, HEAD, CALLS, KIND, ENDS, LETTERS, SPECIALS, TEMPLATE),
)
tiny_inventor_model = MODEL.folder
