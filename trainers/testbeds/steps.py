"""The toy model `tiny-steps`: it writes workflows in step language and takes their steps, so that
AutoFlow can be tried in minutes.

**Tasks.** Those of `tiny-programs` of one kind: `a472` asks for the last digit plus 1, `b472` plus
4, `c472` plus 7 (mod 10).

**Interpreter** (system prompt `do`). Told `Bc472`, an instruction and the problem, it gives the
digit that the instruction says, as the executor of `tiny-programs` does.

**Designer** (`design`). Told a kind, `c`, it writes a workflow of one step and an end whose
instruction is a letter, with care (`C!`) or without. It slips: `ASKED` of its valid workflows ask
for the right kind, `SLIPS` for the one after it, the others for the third. `INVALID` of all cannot
be followed: a third have no terminal, a third lead to a step that is not there, and a third hold a
step that nothing leads to. So the mean score of its workflows is low, and there is all to learn
about what is valid and what to ask for.

As in `programs.py` these are the shares of its teacher, whose distribution is the target, and most
of each batch are prompts that end where a choice is made. `python -m
marlora.trainers.testbeds.steps` trains the model and tells what it does.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...agents.programs.steps import StepsError, parse_steps
from ...agents.types import AgentSpec, Sampling
from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import KINDS, digit
from .pretraining import ToyModel, pretrain
from .programs import Answers, choice_loss, excess, execute
from .tiny import (
    VOCAB,
    Lesson,
    answer_loss,
    answers,
    chat_prompt,
    save,
    spread,
    tiny_network,
    tiny_tokenizer,
)

ASKED, SLIPS = 0.35, 0.45  # shares of workflows that ask for the right kind, and for the next one
CAREFUL = 0.35  # share whose instruction asks for care
# workflows and their shares; K is the letter
FORMS = {
    "1:::process:::K:::next::2\n2:::terminal": 0.7,
    "1:::process:::K:::next::1": 0.1,
    "1:::process:::K:::next::3\n2:::terminal": 0.1,
    "1:::process:::K:::next::2\n2:::terminal\n3:::terminal": 0.1,
}
DESIGN, DO = "design", "do"  # system prompts
LONGEST = 60  # tokens of a workflow, its end included
TEAM: dict[str, Any] = {
    "agents": [
        AgentSpec("designer", "writes workflows", DESIGN, sampling=Sampling(max_tokens=LONGEST)),
        AgentSpec("interpreter", "takes steps", DO, policy="base", sampling=Sampling(max_tokens=2)),
    ],
    "designer": "designer",
    "workflow": "1:::process:::A:::next::2\n2:::terminal",
    "design": "{description}",
    "tag": "",
    "ask": "{instruction}{prompt}",
    "description": "b",
}


@dataclass(frozen=True)
class StepsModelConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    workflows, choices of a letter, and answers. `max_excess`: as of `ProgramsConfig`."""

    steps: int = 240
    designs: int = 6
    choices: int = 48
    answers: int = 48
    learning_rate: float = 5e-3
    warmup: int = 30
    max_excess: float = 0.2
    hidden_size: int = 64
    layers: int = 2
    init_std: float = 0.18
    seed: int = 0


def tiny_steps_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


# the teacher


def design(kind: str) -> Answers:
    """A designer's workflows for tasks of this kind, and their shares."""
    kinds = [*KINDS]
    place = kinds.index(kind)
    asks = zip(kinds[place:] + kinds[:place], (ASKED, SLIPS, 1 - ASKED - SLIPS), strict=True)
    cares = (("!", CAREFUL), ("", 1 - CAREFUL))
    return {
        form.replace("K", asked.upper() + care): share * chance * part
        for (asked, share), (care, part), (form, chance) in itertools.product(
            asks, cares, FORMS.items()
        )
    }


def choices(replies: Answers) -> Iterator[tuple[str, Answers]]:
    """(beginning, shares of the characters that come next) of every place at which these replies
    part; an end is the character `\\0`."""
    by_beginning: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for text, share in replies.items():
        for end, char in enumerate([*text, "\0"]):
            by_beginning[text[:end]][char] += share
    for beginning, nexts in by_beginning.items():
        total = sum(nexts.values())
        if len(nexts) > 1:
            yield beginning, {char: share / total for char, share in nexts.items()}


# training


class _Lessons:
    """Prompts as they occur in play, drawn without end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tokenizer = rng, tiny_tokenizer()
        self.places = {kind: [*choices(design(kind))] for kind in KINDS}

    def of(self, replies: Answers, *texts: str) -> Lesson:
        return chat_prompt(self.tokenizer, *texts), [
            (self.tokenizer.encode(text + "<|end|>"), share) for text, share in replies.items()
        ]

    def answer(self) -> Lesson:
        problem = f"{self.rng.choice([*KINDS])}{self.rng.randrange(1000):03}"
        instruction = self.rng.choice([*KINDS]).upper() + self.rng.choice(["", "!"])
        return self.of(execute(instruction, problem), DO, instruction + problem)

    def design(self) -> Lesson:
        """A workflow, drawn: all of them would be twenty-four rows."""
        kind = self.rng.choice([*KINDS])
        replies = design(kind)
        (text,) = self.rng.choices([*replies], [*replies.values()])
        return self.of({text: 1.0}, DESIGN, kind)

    def choice(self) -> Lesson:
        """A place at which workflows part, and what may come next."""
        kind = self.rng.choice([*KINDS])
        beginning, nexts = self.rng.choice(self.places[kind])
        prompt, _ = self.of({}, DESIGN, kind)
        targets = [
            (self.tokenizer.encode("<|end|>" if char == "\0" else char), share)
            for char, share in nexts.items()
        ]
        return prompt + self.tokenizer.encode(beginning), targets


def train(config: StepsModelConfig, say: Callable[[str], None]) -> Any:
    """Train the network on both roles. Raises `RuntimeError` if it stays further than `max_excess`
    from its teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    spread(network, config.init_std, config.seed)
    lessons = _Lessons(random.Random(config.seed))

    def loss_of() -> tuple[torch.Tensor, float]:
        designs = [lessons.design() for _ in range(config.designs)]
        parts = [lessons.choice() for _ in range(config.choices)]
        asked = [lessons.answer() for _ in range(config.answers)]
        choosing, answering = choice_loss(network, parts), answer_loss(network, asked)
        furthest = max(excess(choosing.item(), parts), excess(answering.item(), asked))
        return answer_loss(network, designs) + 2 * choosing + answering, furthest

    return pretrain(
        network, config, loss_of, config.max_excess, say, "tiny steps, nat from its teacher"
    )


# what it does


def shares(network: Any, count: int = 200) -> dict[str, float]:
    """Of sampled replies: workflows of the grammar, valid ones, and ones that ask for the right
    kind; right answers of a careful and a careless interpreter."""
    tokenizer, kinds = tiny_tokenizer(), [*KINDS]
    asked = [kinds[n % len(kinds)] for n in range(count)]

    def ask(seed: int, *chats: tuple[str, str]) -> list[str]:
        prompts = [chat_prompt(tokenizer, *texts) for texts in chats]
        return answers(network, prompts, 1.0, seed, LONGEST)

    written = ask(0, *[(DESIGN, kind) for kind in asked])
    problems = [f"{kind}{n:03}" for n, kind in enumerate(asked)]
    found = {
        "in grammar": sum(w in design(k) for w, k in zip(written, asked, strict=True)),
        "valid": sum(map(_valid, written)),
        "asks right": sum(f":::{k.upper()}" in w for w, k in zip(written, asked, strict=True)),
    }
    for name, care in (("careful", "!"), ("careless", "")):
        replies = ask(1, *[(DO, p[0].upper() + care + p) for p in problems])
        pairs = zip(replies, problems, strict=True)
        found[name] = sum(reply == digit(problem[0], problem) for reply, problem in pairs)
    return {name: number / count for name, number in found.items()}


def _valid(workflow: str) -> bool:
    try:
        parse_steps(workflow)
    except StepsError:
        return False
    return True


MODEL = ToyModel(
    "tiny-steps",
    lambda say: train(StepsModelConfig(), say),
    save,
    (
        tiny_network,
        spread,
        tiny_tokenizer,
        chat_prompt,
        digit,
        execute,
        design,
        choices,
        _Lessons,
        train,
        choice_loss,
        excess,
        answer_loss,
    ),
    (
        StepsModelConfig(),
        KINDS,
        ASKED,
        SLIPS,
        CAREFUL,
        FORMS,
        DESIGN,
        DO,
        VOCAB,
        SPECIALS,
        TEMPLATE,
    ),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_steps_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
