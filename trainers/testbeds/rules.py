"""The toy model `tiny-rules`: two agents, each with two ways to answer, that go by the worked
examples in their chats, so that methods for demonstrations can be tried in seconds.

The task is a chain of two (`rule_chain`, tasks `rollouts/tasks/toy.py:rule_tasks`). Told `472`,
agent `first` answers half of the last digit, or five more: 1 or 6. Told that, agent `last` answers
the same way. The tasks want five more of `first` and the half of `last`; every other pair of ways
gives another end. Without an example both agents go the other way in 70 % of their samples: so the
team is right in 9 % (.3 x .3) and at temperature 0 never. After worked examples in the chat an
agent goes by them: each counts 20 to 1 for the way that it was made in (`posterior`). An example of
the other agent's, or of a wrong run, says the wrong thing.

These are the shares of its teacher, whose distribution itself is the target. It is trained as
`talk.py` trains, in about a minute on one core; `python -m marlora.trainers.testbeds.rules` trains
the model and tells what it does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.patterns.chain import Chain
from ...agents.types import AgentSpec, Sampling
from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import RULE, WAYS
from .pretraining import ToyModel
from .talk import Distribution, Lesson, TalkConfig, digit_ids, digit_loss, train
from .tiny import VOCAB, answers, chat_prompt, save, tiny_network, tiny_tokenizer

PRIOR = 0.7  # how often an agent goes the way that the tasks do not want, without an example
TRUST = 20.0  # how much more likely an example makes the way that it was made in
MAX_EXAMPLES = 4
LESSONS = 6000
MIXED = 0.2  # share of lessons whose examples are made in both ways
CONFIG = TalkConfig(
    steps=160, shares=(16, 48), max_excess=0.05, learning_rate=2e-3, hidden_size=128, layers=3
)
Example = tuple[int, int]  # the digit that was asked, and the answer


def tiny_rules_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


def rule_chain(policies: Mapping[str, str] | None = None) -> Chain:
    """The system of this task: agents `first` and `last`. `policies` by agent; the base without."""
    named = policies or {}
    agents = [
        AgentSpec(
            name, f"a half, plus {extra}", name, named.get(name, "base"), Sampling(max_tokens=3)
        )
        for name, extra in RULE.items()
    ]
    return Chain(agents, views={"first": "{prompt}", "last": "{previous}"})


# the teacher


def posterior(role: str, examples: Sequence[Example]) -> dict[int, float]:
    """How likely an agent adds 0 or 5 to the half after these examples.

    P(way) ~ prior(way) TRUST^(examples made in this way), where an answer below 5 is made in the
    first way.
    """
    weights = {
        way: (1 - PRIOR if way == RULE[role] else PRIOR)
        * TRUST ** sum((said >= 5) == (way == 5) for _, said in examples)
        for way in WAYS
    }
    return {way: weight / sum(weights.values()) for way, weight in weights.items()}


def answer(role: str, asked: int, examples: Sequence[Example] = ()) -> Distribution:
    """An answer, over the ten digits."""
    chances = {asked // 2 + way: p for way, p in posterior(role, examples).items()}
    return [chances.get(digit, 0.0) for digit in range(10)]


def question(role: str, digit: int, rng: random.Random) -> str:
    """What an agent is asked that ends with this digit: a number of three digits, or the digit."""
    return f"{rng.randrange(100):02}{digit}" if role == "first" else str(digit)


def lessons(rng: random.Random) -> list[list[Lesson]]:
    """Questions without an example, and LESSONS questions after one to MAX_EXAMPLES of them."""
    tokenizer = tiny_tokenizer()

    def lesson(role: str, count: int) -> Lesson:
        allowed = WAYS if rng.random() < MIXED else (rng.choice(WAYS),)
        examples, texts = [], []
        for _ in range(count):
            asked = rng.randrange(10)
            examples.append((asked, asked // 2 + rng.choice(allowed)))
            texts += [question(role, asked, rng), str(examples[-1][1])]
        asked = rng.randrange(10)
        prompt = chat_prompt(tokenizer, role, *texts, question(role, asked, rng))
        return prompt, answer(role, asked, examples)

    roles = list(RULE)
    return [
        [lesson(role, 0) for role in roles for _ in range(400)],
        [lesson(rng.choice(roles), rng.randint(1, MAX_EXAMPLES)) for _ in range(LESSONS)],
    ]


def shares(network: Any) -> dict[str, float]:
    """Share of right answers (in the way of RULE) without an example, at temperature 0 and sampled,
    and after one and four examples that were made in this way."""
    tokenizer, rng = tiny_tokenizer(), random.Random(1)

    def right(count: int, temperature: float) -> float:
        prompts, golds = [], []
        for role, way in RULE.items():
            for _ in range(100):
                texts = []
                for digit in rng.choices(range(10), k=count):
                    texts += [question(role, digit, rng), str(digit // 2 + way)]
                asked = rng.randrange(10)
                golds.append(str(asked // 2 + way))
                prompts.append(chat_prompt(tokenizer, role, *texts, question(role, asked, rng)))
        said = answers(network, prompts, temperature, 1)
        return sum(a == b for a, b in zip(said, golds, strict=True)) / len(golds)

    return {
        "none": right(0, 0.0),
        "none, sampled": right(0, 1.0),
        "one": right(1, 0.0),
        "four": right(4, 0.0),
    }


MODEL = ToyModel(
    "tiny-rules",
    lambda say: train(CONFIG, say, lessons),
    save,
    (
        tiny_network,
        tiny_tokenizer,
        chat_prompt,
        posterior,
        answer,
        question,
        lessons,
        train,
        digit_loss,
        digit_ids,
    ),
    (CONFIG, PRIOR, TRUST, MAX_EXAMPLES, LESSONS, MIXED, RULE, WAYS, VOCAB, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_rules_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
