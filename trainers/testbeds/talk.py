"""The toy model `tiny-talk`: it debates and haggles in single digits, so that methods for teams
that talk can be tried in seconds.

**Debate.** Told `472`, it answers the digit in the middle: right in 55 % of its samples, one too
many in 25 %, one too few in 20 %, on every prompt alike. Told then `[g2] 7`, a blank line, `[g3]
8`, it answers again: in 85 % what most of the three answers say (one of them, if all differ), else
as if it had heard nothing. So a debate of three is better than one, and what is learnt on some
tasks holds for others. It has seen all prompts; held out are tasks of the method, not of its
pre-training.

**Haggling.** As `seller`, told `3 -` (its cost, the offer on the table), it names a price from 3 to
9, all equally likely; as `buyer`, told `8 5`, a price from 0 to 8. It never bargains itself into a
loss, and nothing more: there is all to learn about the other.

These are the shares of its teacher, whose distribution itself is the target. Training is seeded,
single-threaded and short, about 40 s on one core, so the model keeps to them roughly
(tests/trainers/testbeds/test_talk.py has the distances). At temperature 0 the debater is always
right, so what it learns shows in samples only. `python -m marlora.trainers.testbeds.talk` trains
the model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from .pretraining import ToyModel, pretrain
from .tiny import VOCAB, chat_prompt, save, tiny_network, tiny_tokenizer

RIGHT, OVER, UNDER = 0.55, 0.25, 0.2  # shares of an answer that is right, one too many, one too few
FOLLOW = 0.85  # share of second answers that follow the others
SOLVE, SELLER, BUYER = "solve", "seller", "buyer"  # system prompts
SEATS = ("g1", "g2", "g3")
SECONDS = 6000  # lessons of second answers
Distribution = Sequence[float]  # over the ten digits


@dataclass(frozen=True)
class TalkConfig:
    """How the model is trained: AdamW with warm-up, then linear decay to 5 % of `learning_rate`, on
    batches of so many openings of haggling, first and second answers.

    `max_excess`: the mean of KL(teacher | model) over the last 20 steps, in nats per reply, at
    which training is done; at most twice `steps`.
    """

    steps: int = 500
    shares: tuple[int, ...] = (12, 12, 40)
    learning_rate: float = 5e-3
    warmup: int = 30
    max_excess: float = 0.15
    hidden_size: int = 64
    layers: int = 2
    seed: int = 0


def tiny_talk_model(cache: Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


# the teacher


def alone(right: int) -> Distribution:
    """A first answer."""
    wrong = {(right + 1) % 10: OVER, (right - 1) % 10: UNDER}
    return [RIGHT if digit == right else wrong.get(digit, 0.0) for digit in range(10)]


def revised(right: int, answers: Sequence[int]) -> Distribution:
    """A second answer, after its own first and the others' were heard."""
    counts = Counter(answers)
    most = max(counts.values())
    heard = [d for d, n in counts.items() if n == most]
    return [
        FOLLOW * (d in heard) / len(heard) + (1 - FOLLOW) * share
        for d, share in enumerate(alone(right))
    ]


def price(role: str, limit: int) -> Distribution:
    """A price of a seller whose cost, or a buyer whose value, is `limit`."""
    allowed = range(limit, 10) if role == SELLER else range(limit + 1)
    return [(d in allowed) / len(allowed) for d in range(10)]


def others_said(seat: int, answers: Sequence[int]) -> str:
    """What the debater of a seat is told of the answers of all seats (`agents/patterns/debate.py`,
    view `{others}`)."""
    return "\n\n".join(
        f"[{name}] {d}" for n, (name, d) in enumerate(zip(SEATS, answers, strict=True)) if n != seat
    )


# training

Lesson = tuple[
    list[int], Distribution
]  # prompt tokens of a chat that ends with a user message; the digits that may follow


def _lessons(rng: random.Random) -> list[list[Lesson]]:
    """All openings of haggling, all first answers, and SECONDS second answers, as they occur in
    play."""
    tokenizer = tiny_tokenizer()

    def lesson(digits: Distribution, *texts: str) -> Lesson:
        return chat_prompt(tokenizer, *texts), digits

    haggling = [lesson(price(SELLER, n), SELLER, f"{n} -") for n in range(10)]
    haggling += [
        lesson(price(BUYER, n), BUYER, f"{n} {offer}") for n in range(10) for offer in range(10)
    ]
    asked = [f"{n:03}" for n in range(1000)]
    firsts = [lesson(alone(int(each[1])), SOLVE, each) for each in asked]
    seconds = []
    for _ in range(SECONDS):
        task, seat = rng.choice(asked), rng.randrange(3)
        answers = rng.choices(range(10), alone(int(task[1])), k=3)
        texts = (SOLVE, task, str(answers[seat]), others_said(seat, answers))
        seconds.append(lesson(revised(int(task[1]), answers), *texts))
    return [haggling, firsts, seconds]


def train(
    config: TalkConfig,
    say: Callable[[str], None],
    make: Callable[[random.Random], list[list[Lesson]]] | None = None,
) -> Any:
    """Train the network. Raises `RuntimeError` if it stays further than `max_excess` from its
    teacher.

    `make`: lessons of another teacher, in as many parts as `config.shares` has.
    """
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    rng, digits = random.Random(config.seed), digit_ids()
    lessons = (make or _lessons)(rng)

    def loss_of() -> tuple[torch.Tensor, float]:
        batch = [
            each
            for part, share in zip(lessons, config.shares, strict=True)
            for each in rng.sample(part, share)
        ]
        return digit_loss(network, batch, digits)

    return pretrain(
        network, config, loss_of, config.max_excess, say, "tiny talk, nat from its teacher"
    )


def digit_loss(
    network: Any, lessons: Sequence[Lesson], digits: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the digit and of the end after it, per reply, and by how much it exceeds the
    teacher's entropy.

    `digits`: token ids of the ten digits.
    """
    width = max(len(prompt) for prompt, _ in lessons) + 1
    likely = [digits[max(range(10), key=d.__getitem__)] for _, d in lessons]
    ids = torch.tensor(
        [
            p + [digit] + [0] * (width - len(p) - 1)
            for (p, _), digit in zip(lessons, likely, strict=True)
        ]
    )
    last, at = torch.tensor([len(p) - 1 for p, _ in lessons]), torch.arange(len(lessons))
    targets = torch.zeros(len(lessons), VOCAB)
    targets[:, digits] = torch.tensor([list(d) for _, d in lessons])
    hidden = network.model(input_ids=ids).last_hidden_state
    digit = torch.log_softmax(network.lm_head(hidden[at, last]), -1)
    end = torch.log_softmax(network.lm_head(hidden[at, last + 1]), -1)[:, 1]
    loss = -(targets * digit).sum(-1).mean() - end.mean()
    entropy = -(targets * targets.clamp(min=1e-30).log()).sum(-1).mean()
    return loss, float(loss.detach() - entropy)


def digit_ids() -> list[int]:
    """Token ids of the ten digits."""
    tokenizer = tiny_tokenizer()
    return [tokenizer.encode(str(d))[0] for d in range(10)]


MODEL = ToyModel(
    "tiny-talk",
    lambda say: train(TalkConfig(), say),
    save,
    (
        tiny_network,
        tiny_tokenizer,
        chat_prompt,
        alone,
        revised,
        price,
        others_said,
        _lessons,
        train,
        digit_loss,
        digit_ids,
    ),
    (
        TalkConfig(),
        RIGHT,
        OVER,
        UNDER,
        FOLLOW,
        SOLVE,
        SELLER,
        BUYER,
        SEATS,
        SECONDS,
        VOCAB,
        SPECIALS,
        TEMPLATE,
    ),
)


if __name__ == "__main__":
    print(tiny_talk_model(say=lambda line: print(line, flush=True)))
