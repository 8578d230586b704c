"""The toy model `tiny-programs`: it writes programs and answers what they ask, so that methods for
workflows can be tried in minutes.

**Tasks.** `a472` asks for the last digit plus 1, `b472` plus 4, `c472` plus 7 (mod 10).

**Executor** (system prompt `do`). Told `Bc472`, an instruction and the problem, it gives the digit
that the instruction says, whatever the problem asks: right in two of three samples, else one too
many. Told `B!c472` it takes care and is right.

**Designer** (`design`). Told `c472`, it writes a program that calls `custom` with an instruction,
with care or without. It slips: in 45 % of its programs it asks for the kind after the one that the
problem wants, in 35 % for the right one, in 10 % for the third; 10 % call what does not exist. So a
program is worth 0, 2/3 or 1, its most likely one 0, the right ones are in reach of every few
samples, and there is all to learn about what to ask for. Told then how many of two tests the
program passed (`0/2`, `invalid`), it writes another: after two failures it asks for another digit,
else for the same again.

These are the shares of its teacher, whose distribution itself is the target. Most of each batch are
prompts that end where the instruction goes, with what may come next as one soft target: that letter
is all a designer decides, and among the twenty tokens of a program it would hardly be learnt.
Training is seeded, single-threaded, a minute or a little more on one core; `python -m
marlora.trainers.testbeds.programs` trains the model and tells what it does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...agents.types import AgentSpec, Sampling
from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import KINDS, digit, program_tasks
from .pretraining import ToyModel, pretrain
from .tiny import (
    VOCAB,
    Lesson,
    answer_loss,
    answers,
    chat_prompt,
    save,
    tiny_network,
    tiny_tokenizer,
)

# shares of programs that ask for the right digit, for the next one, and that cannot be run
ASKED, SLIPS, INVALID = 0.35, 0.45, 0.1
RIGHT = 2 / 3  # share of a careless executor's answers that are right; the others are one too many
# programs and their shares; K is the instruction
FORMS: Mapping[str, float] = {'await custom("K")': 0.65, 'await custom("K!")': 0.35}
BROKEN = 'await magic("K")'
DESIGN, DO = "design", "do"  # system prompts
FEEDBACK = ("0/2", "1/2", "2/2", "invalid")
LONGEST = 20  # tokens of a program, its end included
WORKFLOW: dict[str, Any] = {
    "agents": [
        AgentSpec("designer", "writes programs", DESIGN, sampling=Sampling(max_tokens=LONGEST)),
        AgentSpec(
            "executor", "answers what they ask", DO, policy="base", sampling=Sampling(max_tokens=2)
        ),
    ],
    "operators": ["custom"],
    "prompts": {"custom": "{instruction}{problem}"},
    "instruction": "{prompt}",
    "tag": "",
    "max_text": 60,
    "dry_run": False,  # what these programs get wrong is a name, which is seen without a run
}


@dataclass(frozen=True)
class ProgramsConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    designs, choices of a letter, and answers.

    `max_excess`: the mean of KL(teacher | model) over the last 20 steps, in nats per reply, at
    which training is done; at most twice `steps`. `init_std`: of all matrices at the start. From
    the usual .02 a network as narrow as this one knows no answer after 260 steps; from .12 it knows
    most after 120.
    """

    steps: int = 500
    designs: int = 3
    letters: int = 80
    answers: int = 48
    learning_rate: float = 5e-3
    warmup: int = 30
    max_excess: float = 0.2
    hidden_size: int = 64
    layers: int = 2
    init_std: float = 0.18
    seed: int = 0


def tiny_programs_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


# the teacher

Answers = Mapping[str, float]  # replies and their shares


def execute(instruction: str, problem: str) -> Answers:
    """An executor's answer to `custom`."""
    right = digit(instruction[0].lower(), problem)
    return (
        {right: 1.0}
        if instruction.endswith("!")
        else {right: RIGHT, str((int(right) + 1) % 10): 1 - RIGHT}
    )


def design(kind: str, history: Sequence[tuple[str, str, str]] = ()) -> Answers:
    """A designer's program. `history`: of earlier rounds the instruction's kind, the form, and the
    feedback."""
    kinds = [*KINDS]
    place = kinds.index(kind)
    asks = dict(
        zip(kinds[place:] + kinds[:place], (ASKED, SLIPS, 1 - INVALID - ASKED - SLIPS), strict=True)
    )
    weight = {(k, form): share * asks[k] for k in KINDS for form, share in FORMS.items()}
    weight |= {(k, BROKEN): INVALID / 3 for k in KINDS}
    for k, _, feedback in history:
        for asked, form in weight:
            if form == BROKEN:
                weight[asked, form] *= 0.1 if feedback == "invalid" else 1.0
            elif asked == k and feedback != "invalid":
                weight[asked, form] *= 0.05 if feedback == "0/2" else 20.0
    total = sum(weight.values())
    return {form.replace("K", k.upper()): share / total for (k, form), share in weight.items()}


# training


class _Lessons:
    """Prompts as they occur in play, drawn without end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tokenizer = rng, tiny_tokenizer()

    def of(self, replies: Answers, *texts: str) -> Lesson:
        return chat_prompt(self.tokenizer, *texts), [
            (self.tokenizer.encode(text + "<|end|>"), share) for text, share in replies.items()
        ]

    def problem(self) -> str:
        return f"{self.rng.choice([*KINDS])}{self.rng.randrange(1000):03}"

    def answer(self) -> Lesson:
        problem, instruction = (
            self.problem(),
            self.rng.choice([*KINDS]).upper() + self.rng.choice(["", "!"]),
        )
        return self.of(execute(instruction, problem), DO, instruction + problem)

    def round(self) -> tuple[list[str], Answers]:
        """What a designer is told, in its first or its second round, and what it may reply."""
        rng, problem = self.rng, self.problem()
        if rng.random() < 0.3:
            return [DESIGN, problem], design(problem[0])
        kind, form = rng.choice([*KINDS]), rng.choice([*FORMS, BROKEN])
        feedback = "invalid" if form == BROKEN else rng.choice(FEEDBACK[:3])
        return [DESIGN, problem, form.replace("K", kind.upper()), feedback], design(
            problem[0], [(kind, form, feedback)]
        )

    def design(self) -> Lesson:
        texts, replies = self.round()
        return self.of(replies, *texts)

    def letter(self) -> Lesson:
        """The same, up to the one token that matters: what is asked for."""
        texts, replies = self.round()
        start = next(iter(FORMS)).split("K")[0]
        total = sum(share for text, share in replies.items() if text.startswith(start))
        prompt, _ = self.of({}, *texts)
        asked = {
            k: (
                sum(share for text, share in replies.items() if text.startswith(start + k.upper()))
                / total
            )
            for k in KINDS
        }
        return prompt + self.tokenizer.encode(start), [
            (self.tokenizer.encode(k.upper()), share) for k, share in asked.items()
        ]


def train(config: ProgramsConfig, say: Callable[[str], None]) -> Any:
    """Train the network on both roles. Raises `RuntimeError` if it stays further than `max_excess`
    from its teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=config.init_std)
    lessons = _Lessons(random.Random(config.seed))
    kinds = [
        (lessons.design, config.designs),
        (lessons.letter, config.letters),
        (lessons.answer, config.answers),
    ]

    def loss_of() -> tuple[torch.Tensor, float]:
        parts = [[lesson() for _ in range(count)] for lesson, count in kinds]
        losses = [
            loss(network, part)
            for loss, part in zip((answer_loss, choice_loss, answer_loss), parts, strict=True)
        ]
        excesses = [excess(loss.item(), part) for loss, part in zip(losses, parts, strict=True)]
        return losses[0] + 2 * losses[1] + losses[2], max(excesses)

    return pretrain(
        network, config, loss_of, config.max_excess, say, "tiny programs, nat from its teacher"
    )


def choice_loss(network: Any, lessons: Sequence[Lesson]) -> torch.Tensor:
    """Cross-entropy of the one token that comes next: one row per prompt, its replies in the
    target."""
    width = max(len(prompt) for prompt, _ in lessons)
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt, _ in lessons])
    target = torch.zeros(len(lessons), VOCAB)
    for row, (_, replies) in enumerate(lessons):
        for (token,), share in replies:
            target[row, token] = share
    hidden = network.model(input_ids=ids).last_hidden_state
    last = hidden[
        torch.arange(len(lessons)), torch.tensor([len(prompt) - 1 for prompt, _ in lessons])
    ]
    return nn.functional.cross_entropy(network.lm_head(last), target)


def excess(loss: float, lessons: Sequence[Lesson]) -> float:
    """By how much a loss per token exceeds the teacher's entropy, in nats per reply."""
    lengths = [(len(tokens), share) for _, replies in lessons for tokens, share in replies]
    whole = loss * sum(length * share for length, share in lengths)
    return (whole + sum(share * math.log(share) for _, share in lengths)) / len(lessons)


# what it does


def shares(network: Any, count: int = 300) -> dict[str, float]:
    """Of sampled replies: programs that are one of the grammar, ask for what the problem asks, and
    are broken; second programs that ask for something else after `0/2`; right answers of a careless
    and a careful executor."""
    tasks = program_tasks("eval")[:count]
    tokenizer = tiny_tokenizer()

    def ask(seed: int, *chats: Sequence[str]) -> list[str]:
        prompts = [chat_prompt(tokenizer, *texts) for texts in chats]
        return answers(network, prompts, 1.0, seed, LONGEST)

    known = {form.replace("K", kind.upper()): kind for form in FORMS for kind in KINDS}
    broken = {BROKEN.replace("K", kind.upper()) for kind in KINDS}
    first = ask(0, *[(DESIGN, t.prompt) for t in tasks])
    tried = [list(known)[n % len(known)] for n in range(len(tasks))]
    second = ask(1, *[(DESIGN, t.prompt, p, "0/2") for t, p in zip(tasks, tried, strict=True)])
    careless = ask(2, *[(DO, t.meta["kind"].upper() + t.prompt) for t in tasks])
    careful = ask(3, *[(DO, t.meta["kind"].upper() + "!" + t.prompt) for t in tasks])
    total = len(tasks)
    return {
        "in grammar": sum(p in known or p in broken for p in first) / total,
        "asks right": (
            sum(known.get(p) == t.meta["kind"] for p, t in zip(first, tasks, strict=True)) / total
        ),
        "broken": sum(p in broken for p in first) / total,
        "asks anew": (
            sum(known.get(p, "") != known[q] for p, q in zip(second, tried, strict=True)) / total
        ),
        "careless": sum(a == t.answer for a, t in zip(careless, tasks, strict=True)) / total,
        "careful": sum(a == t.answer for a, t in zip(careful, tasks, strict=True)) / total,
    }


MODEL = ToyModel(
    "tiny-programs",
    lambda say: train(ProgramsConfig(), say),
    save,
    (
        tiny_network,
        tiny_tokenizer,
        chat_prompt,
        digit,
        execute,
        design,
        _Lessons,
        train,
        choice_loss,
        excess,
        answer_loss,
    ),
    (
        ProgramsConfig(),
        KINDS,
        ASKED,
        SLIPS,
        INVALID,
        RIGHT,
        dict(FORMS),
        BROKEN,
        DESIGN,
        DO,
        FEEDBACK,
        VOCAB,
        SPECIALS,
        TEMPLATE,
    ),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_programs_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
