"""A tiny model that writes programs and answers what they ask, so that methods for workflows can be tried in minutes.

**Tasks.** `m472` asks for the digit in the middle of three, `f472` for the first, `l472` for the last.

**Executor** (system prompt `do`). Told `mf472`, an instruction and the problem, it names the digit that the instruction says, whatever the
problem asks: right in two of three samples, else one too many. Told `m!f472` it takes care and is right.

**Designer** (`design`). Told `f472`, it writes a program that calls `custom` with an instruction: once, once with care, or three times, of
which the least counts. In 40 % of its programs the instruction is what the problem asks for, in 25 % each of the two others; 10 % call
what does not exist. So programs of one task are worth 0.1 to 1, most are worth little, and there is all to learn about what to ask for.
Told then how many of two tests the program passed (`0/2`, `invalid`), it writes another: after a failure it should ask for another digit,
after a success repeat itself.

These are the shares of its teacher, whose distribution itself is the target. In answers it keeps to them. What it asks for it writes without
a look at the problem (right in .33 of its programs, not .40), and of feedback it learns next to nothing (after `0/2` it asks for another
digit in .71 of its programs, where one that does not listen would in two thirds).
Training is seeded, single-threaded, about a minute on one core; `python -m marlora.trainers.tiny_programs` trains the model and tells
what it does.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..agents.types import AgentSpec, Sampling, Task
from ..agents.workflow import Workflow
from ..rollouts.engines.scripted import SPECIALS, TEMPLATE
from ..rollouts.rows import unit
from . import tiny
from .tiny import VOCAB, Lesson, answers, fit, kept, tiny_network, tiny_tokenizer

KINDS = "fml"  # first, middle, last
ASKED, INVALID = 0.4, 0.1  # share of programs that ask for the digit the problem wants, and of those that are none
RIGHT = 2 / 3  # share of a careless executor's answers that are right; the others are one too many
FORMS: Mapping[str, float] = {  # programs and their shares; K stands for the instruction
    'await custom("K")': 0.5,
    'await custom("K!")': 0.2,
    'min([await custom("K") for n in "123"])': 0.3,
}
BROKEN = 'await magic("K")'
DESIGN, DO = "design", "do"  # system prompts
FEEDBACK = ("0/2", "1/2", "2/2", "invalid")
LONGEST = 48  # tokens of a program, its end included
WORKFLOW: dict[str, Any] = {
    "agents": [
        AgentSpec("designer", "writes programs", DESIGN, sampling=Sampling(max_tokens=LONGEST)),
        AgentSpec("executor", "answers what they ask", DO, policy="base", sampling=Sampling(max_tokens=2)),
    ],
    "operators": ["custom"],
    "prompts": {"custom": "{instruction}{problem}"},
    "instruction": "{prompt}",
    "tag": "",
    "max_text": 60,
}


@dataclass(frozen=True)
class ProgramsConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many designs and answers of an executor.

    `max_excess`: the mean of KL(teacher | model) over the last 20 steps, in nats per reply, at which training is done; at most twice
    `steps`.
    """

    steps: int = 320
    designs: int = 4
    answers: int = 64
    learning_rate: float = 5e-3
    warmup: int = 30
    max_excess: float = 0.55
    hidden_size: int = 64
    layers: int = 2
    seed: int = 0


def program_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """The 3000 tasks in two halves, `train` and `eval`, shuffled. Public meta `examples`: two other problems of the kind, with answers."""
    rng, tasks = random.Random(seed), []
    for kind, number in itertools.product(KINDS, range(1000)):
        prompt = f"{kind}{number:03}"
        if (unit(f"programs {prompt}") < 0.5) == (split == "eval"):
            others = [f"{kind}{unit(f'{prompt} {n}') * 1000:03.0f}"[:4] for n in range(2)]
            meta = {"kind": kind, "examples": [[other, digit(kind, other)] for other in others]}
            tasks.append(Task(prompt, prompt, digit(kind, prompt), "programs", split, meta))
    rng.shuffle(tasks)
    return tasks


def tiny_workflow(**settings: Any) -> Workflow:
    """The system of these tasks: a designer with a policy of its own; the executor is the base."""
    return Workflow(**{**WORKFLOW, **settings})


def tiny_programs_model(cache: Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of `tiny_model`."""
    return kept(f"tiny-programs-{_recipe()}", lambda: train(ProgramsConfig(), say or (lambda line: None)), cache)


# the teacher

Answers = Mapping[str, float]  # replies and their shares


def digit(kind: str, problem: str) -> str:
    """The digit of this kind in a problem, whatever the problem asks for."""
    return problem[1 + KINDS.index(kind)]


def execute(instruction: str, problem: str) -> Answers:
    """An executor's answer to `custom`."""
    right = digit(instruction[0], problem)
    return {right: 1.0} if instruction.endswith("!") else {right: RIGHT, str((int(right) + 1) % 10): 1 - RIGHT}


def design(kind: str, history: Sequence[tuple[str, str, str]] = ()) -> Answers:
    """A designer's program. `history`: of earlier rounds the instruction's kind, the form, and the feedback."""
    weight = {
        (k, form): share * (1 - INVALID) * (ASKED if k == kind else (1 - INVALID - ASKED) / 2) / (1 - INVALID)
        for k in KINDS
        for form, share in FORMS.items()
    }
    weight |= {(k, BROKEN): INVALID / 3 for k in KINDS}
    for k, form, feedback in history:
        for other in weight:
            if feedback == "0/2" and other[0] == k:
                weight[other] *= 0.1
            elif feedback == "1/2" and other[0] == k:
                weight[other] *= 1.0 if other[1] == form else 4.0
            elif feedback == "2/2" and other == (k, form):
                weight[other] *= 100.0
            elif feedback == "invalid" and other[1] == BROKEN:
                weight[other] *= 0.1
    total = sum(weight.values())
    return {form.replace("K", k): share / total for (k, form), share in weight.items()}


# training


class _Lessons:
    """Prompts as they occur in play, drawn without end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tokenizer = rng, tiny_tokenizer()

    def of(self, replies: Answers, *said: str) -> Lesson:
        roles = ["system", *("user" if n % 2 == 0 else "assistant" for n in range(len(said) - 1))]
        chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        prompt = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return prompt, [(self.tokenizer.encode(text + "<|end|>"), share) for text, share in replies.items()]

    def problem(self) -> str:
        return f"{self.rng.choice(KINDS)}{self.rng.randrange(1000):03}"

    def answer(self) -> Lesson:
        problem, instruction = self.problem(), self.rng.choice(KINDS) + self.rng.choice(["", "!"])
        return self.of(execute(instruction, problem), DO, instruction + problem)

    def design(self) -> Lesson:
        rng, problem = self.rng, self.problem()
        history: list[tuple[str, str, str]] = []
        said = [DESIGN, problem]
        for _ in range(rng.choice([0, 1, 1, 2])):
            kind, form = rng.choice(KINDS), rng.choice([*FORMS, BROKEN])
            feedback = "invalid" if form == BROKEN else rng.choice(FEEDBACK[:3])
            history.append((kind, form, feedback))
            said += [form.replace("K", kind), feedback]
        return self.of(design(problem[0], history), *said)


def train(config: ProgramsConfig, say: Callable[[str], None]) -> Any:
    """Train the network on both roles. Raises `RuntimeError` if it stays further than `max_excess` from its teacher."""
    network = tiny_network(hidden_size=config.hidden_size, layers=config.layers, seed=config.seed).train()
    lessons = _Lessons(random.Random(config.seed))

    def loss_of() -> tuple[torch.Tensor, float]:
        parts = [
            [lessons.design() for _ in range(config.designs)],
            [lessons.answer() for _ in range(config.answers)],
        ]
        losses = [tiny._loss(network, part) for part in parts]
        return 2 * losses[0] + losses[1], max(excess(loss.item(), part) for loss, part in zip(losses, parts, strict=True))

    return fit(network, config, loss_of, config.max_excess, say, "tiny programs, nat from its teacher")


def excess(loss: float, lessons: Sequence[Lesson]) -> float:
    """By how much a loss per token exceeds the teacher's entropy, in nats per reply."""
    told = [(len(tokens), share) for _, replies in lessons for tokens, share in replies]
    whole = loss * sum(length * share for length, share in told)
    return (whole + sum(share * math.log(share) for _, share in told)) / len(lessons)


def _recipe() -> str:
    """A hash of all that the trained weights follow from."""
    parts = (tiny_network, tiny_tokenizer, digit, execute, design, _Lessons, fit, train, excess, tiny._loss)
    facts = (ProgramsConfig(), KINDS, ASKED, INVALID, RIGHT, dict(FORMS), BROKEN, DESIGN, DO, FEEDBACK, VOCAB, SPECIALS, TEMPLATE)
    return hashlib.sha256("\n".join([*(inspect.getsource(p) for p in parts), repr(facts)]).encode()).hexdigest()[:12]


# what it does


def shares(network: Any, count: int = 300) -> dict[str, float]:
    """Of sampled replies: programs that are one of the grammar, ask for what the problem asks, and are broken; second programs that ask
    for something else after `0/2`; right answers of a careless and a careful executor."""
    tasks = program_tasks("eval")[:count]
    tokenizer = tiny_tokenizer()

    def ask(seed: int, *chats: Sequence[str]) -> list[str]:
        prompts = []
        for said in chats:
            roles = ["system", *("user" if n % 2 == 0 else "assistant" for n in range(len(said) - 1))]
            chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            prompts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        return answers(network, prompts, 1.0, seed, LONGEST)

    known = {form.replace("K", kind): kind for form in FORMS for kind in KINDS}
    broken = {BROKEN.replace("K", kind) for kind in KINDS}
    first = ask(0, *[(DESIGN, t.prompt) for t in tasks])
    tried = [list(known)[n % len(known)] for n in range(len(tasks))]
    second = ask(1, *[(DESIGN, t.prompt, p, "0/2") for t, p in zip(tasks, tried, strict=True)])
    careless = ask(2, *[(DO, t.meta["kind"] + t.prompt) for t in tasks])
    careful = ask(3, *[(DO, t.meta["kind"] + "!" + t.prompt) for t in tasks])
    total = len(tasks)
    return {
        "in grammar": sum(p in known or p in broken for p in first) / total,
        "asks right": sum(known.get(p) == t.meta["kind"] for p, t in zip(first, tasks, strict=True)) / total,
        "broken": sum(p in broken for p in first) / total,
        "asks anew": sum(known.get(p, "") != known[q] for p, q in zip(second, tried, strict=True)) / total,
        "careless": sum(a == t.answer for a, t in zip(careless, tasks, strict=True)) / total,
        "careful": sum(a == t.answer for a, t in zip(careful, tasks, strict=True)) / total,
    }


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_programs_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
