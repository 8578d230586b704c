"""The toy model `tiny-pair`, for two agents and a verifier: it does sums, slips, and then keeps its
answer or takes the other's, regardless of the verifier.

Told `3+4`, it answers 7 in 60 % of its samples and 8 in 40 %, on every prompt alike. Told then
`-7+` (a verifier's sign on its own answer, the other's answer, the sign on that), it answers again:
its own answer or the other's, one as likely as the other. So a second round is as good as the first
and no better. What can be learnt is to believe the signs: then a second answer is right wherever
one of the two was, .84 (1 - .4 x .4) instead of .60. It has seen all prompts; held out are tasks of
the method, not of its pre-training.

The views of `agents/patterns/collaboration.py` for it are in `PAIR`. It is trained as
`talk.py` trains, in less than a minute on one core; `python -m marlora.trainers.testbeds.pair`
trains the model and tells how it answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import ASKED
from .pretraining import ToyModel
from .talk import Distribution, Lesson, TalkConfig, digit_ids, digit_loss, train
from .tiny import VOCAB, answers, chat_prompt, save, tiny_network, tiny_tokenizer

RIGHT = 0.6  # share of first answers that are right; the others are one too many
PAIR: dict[str, Any] = {
    "quote": "{answer}{verdict}",
    "revise": "{verdict}{others}",
    "verdict": "{words}",
    "words": ["-", "-", "+", "+"],
}
SECONDS = 8000  # lessons of second answers
STRANGE = 0.3  # share of them in which any two digits stand, not two answers of the teacher
CONFIG = TalkConfig(
    steps=250, shares=(32, 48), max_excess=0.06, learning_rate=4e-3, hidden_size=128, layers=3
)


def tiny_pair_model(cache: Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


def first(right: int) -> Distribution:
    """A first answer."""
    return [RIGHT if d == right else (1 - RIGHT) * (d == (right + 1) % 10) for d in range(10)]


def second(own: int, other: int) -> Distribution:
    """An answer after the other was heard."""
    return [0.5 * (d == own) + 0.5 * (d == other) for d in range(10)]


def lessons(rng: random.Random) -> list[list[Lesson]]:
    """All first answers, and SECONDS second ones after any signs."""
    tokenizer = tiny_tokenizer()

    def lesson(digits: Distribution, *texts: str) -> Lesson:
        return chat_prompt(tokenizer, *texts, system=False), digits

    seconds = []
    for _ in range(SECONDS):
        asked, value = rng.choice(list(ASKED.items()))
        own, other = rng.choices(range(10), None if rng.random() < STRANGE else first(value), k=2)
        seconds.append(
            lesson(
                second(own, other), asked, str(own), f"{rng.choice('+-')}{other}{rng.choice('+-')}"
            )
        )
    return [[lesson(first(value), asked) for asked, value in ASKED.items()], seconds]


def shares(network: Any) -> dict[str, float]:
    """Of sampled answers to all prompts: share of first ones that are right, and of second ones,
    after two that differ, that are the member's own, and that are either."""
    tokenizer = tiny_tokenizer()

    def ask(*texts: str) -> list[int]:
        return chat_prompt(tokenizer, *texts, system=False)

    cases = [(asked, value, (value + 1) % 10) for asked, value in ASKED.items()] * 5
    firsts = answers(network, [ask(asked) for asked, _, _ in cases], 1.0, 1)
    seconds = answers(
        network, [ask(asked, str(own), f"-{other}+") for asked, own, other in cases], 1.0, 2
    )
    return {
        "first right": (
            sum(text == str(value) for text, (_, value, _) in zip(firsts, cases, strict=True))
            / len(cases)
        ),
        "second own": (
            sum(text == str(own) for text, (_, own, _) in zip(seconds, cases, strict=True))
            / len(cases)
        ),
        "second either": (
            sum(
                text in (str(own), str(other))
                for text, (_, own, other) in zip(seconds, cases, strict=True)
            )
            / len(cases)
        ),
    }


MODEL = ToyModel(
    "tiny-pair",
    lambda say: train(CONFIG, say, lessons),
    save,
    (
        tiny_network,
        tiny_tokenizer,
        chat_prompt,
        first,
        second,
        lessons,
        train,
        digit_loss,
        digit_ids,
    ),
    (CONFIG, RIGHT, SECONDS, STRANGE, ASKED, VOCAB, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_pair_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
