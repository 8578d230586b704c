"""The toy model `tiny-world`: it plays every role of a team on one task set, so that methods which
change prompts, demonstrations, seats, edges, programs and weights can be compared.

What it should do in which role stands in `lessons.py`; it learns that roughly. At temperature 0 it
is right in 48 % of the problems where it is told `A`, in 65 % with `K`, in 76 % with `K!`, and in
around 50 % after examples, right or wrong. Among others who agree it follows them in 86 % of its
samples, and nearly all its programs and workflows are of the grammar.
`tiny-world-b` and `tiny-world-c` are the same model, taught further
to be right on problems of one kind, whatever they are told or shown.

Training is seeded and single-threaded, some minutes on one core; `python -m
marlora.trainers.testbeds.world.model` trains the models and tells what they do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ....rollouts.tasks.toy import KINDS, digit, program_tasks
from ..pretraining import ToyModel, pretrain
from ..tiny import VOCAB, answers, chat_prompt, save, spread, tiny_network, tiny_tokenizer
from .lessons import (
    DESIGN,
    DO,
    FACTS,
    STEPS,
    Lesson,
    Lessons,
    asked_answer,
    design,
    instructions,
    own_share,
    slip_share,
    work,
    workflow,
)

COUNTS: Mapping[str, int] = {  # lessons of a batch, by method of `Lessons`
    "alone": 40,
    "after_examples": 12,
    "among_others": 12,
    "program": 8,
    "workflow": 3,
}
WRONG, RIGHT, CAREFUL = "A", "K", "K!"  # prompts of a worker
EXPERT_COUNTS: Mapping[str, int] = {"alone": 24, "after_examples": 8, "among_others": 16}


@dataclass(frozen=True)
class WorldConfig:
    """How a model is trained: AdamW with warm-up, then linear decay.

    max_excess: the mean of KL(teacher | model) over the last 20 steps, in nats per reply of the
    role that is furthest away, at which training is done; at most twice `steps`. init_std: of all
    matrices at the start.
    """

    steps: int = 420
    learning_rate: float = 3e-3
    warmup: int = 40
    max_excess: float = 0.8
    hidden_size: int = 128
    layers: int = 3
    init_std: float = 0.06
    seed: int = 0


CONFIG = WorldConfig()
# then with letters as prompts, which are learnt soon by who knows what they ask for
SECOND = WorldConfig(steps=140, learning_rate=2e-3, warmup=10, max_excess=0.6)
LETTERS_AS_PROMPTS = 0.8  # share, in the second part
EXPERT = WorldConfig(steps=70, learning_rate=2e-3, warmup=5, max_excess=1.2)


def tiny_world_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


def train(config: WorldConfig, say: Callable[[str], None]) -> Any:
    """Train the network in all roles, in two parts. Raises `RuntimeError` if it stays further than
    `max_excess` from its teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    spread(network, config.init_std, config.seed)
    _taught(network, config, Lessons(random.Random(config.seed)), COUNTS, say)
    lessons = Lessons(random.Random(config.seed + 1), letters=LETTERS_AS_PROMPTS)
    return _taught(network.train(), SECOND, lessons, COUNTS, say)


def _taught(
    network: Any,
    config: WorldConfig,
    lessons: Lessons,
    counts: Mapping[str, int],
    say: Callable[[str], None],
) -> Any:
    def loss_of() -> tuple[torch.Tensor, float]:
        losses, excesses = [], []
        for name, count in counts.items():
            loss, excess = teacher_loss(network, [getattr(lessons, name)() for _ in range(count)])
            losses.append(loss)
            excesses.append(excess)
        return torch.stack(losses).sum(), max(excesses)

    return pretrain(network, config, loss_of, config.max_excess, say, "tiny world, nat")


def teacher_loss(network: Any, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the replies, with the teacher's shares as targets at every place: of each
    reply its sum by the root of its length, so that long ones do not drown the others. And by how
    much it exceeds the targets' entropy, in nats per reply."""
    width = max(len(each.prompt) + len(each.reply) for each in lessons)
    rows = [each.prompt + each.reply for each in lessons]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = [
        (row, len(each.prompt) + n - 1, shares)
        for row, each in enumerate(lessons)
        for n, shares in enumerate(each.targets)
    ]
    targets = torch.zeros(len(places), VOCAB)
    for number, (_, _, shares) in enumerate(places):
        for token, share in shares.items():
            targets[number, token] = share
    hidden = network.model(input_ids=ids).last_hidden_state
    at = hidden[[row for row, _, _ in places], [column for _, column, _ in places]]
    log_shares = torch.log_softmax(network.lm_head(at), -1)
    costs = -(targets * log_shares).sum(-1)
    entropies = -(targets * targets.clamp(min=1e-30).log()).sum(-1)
    roots = torch.tensor([len(lessons[row].reply) ** 0.5 for row, _, _ in places])
    loss = (costs / roots).sum() / len(lessons)
    return loss, float((costs.detach() - entropies).sum()) / len(lessons)


# experts


def tiny_world_b_model() -> Path:
    """The folder of the expert in problems of kind b; taught on first use, then cached."""
    return _expert_folder("b")


def tiny_world_c_model() -> Path:
    """The folder of the expert in problems of kind c; taught on first use, then cached."""
    return _expert_folder("c")


def _expert_folder(kind: str) -> Path:
    tiny_world_model()  # before the lock of the cache is taken, which it needs itself
    return EXPERTS[kind].folder()


def teach_expert(kind: str, say: Callable[[str], None]) -> Any:
    """The model, taught further as a worker that is an expert in one kind of problem."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_world_model()).train()
    return _taught(
        network, EXPERT, Lessons(random.Random(1), kind, LETTERS_AS_PROMPTS), EXPERT_COUNTS, say
    )


# what they do


def shares(network: Any, count: int = 120) -> dict[str, float]:
    """Of replies to held-out problems: right ones at temperature 0 by prompt and instruction, and
    after three right and three wrong examples under the wrong prompt; sampled answers that follow
    two others that agree; programs and workflows of the grammar."""
    tasks = program_tasks("eval")[:count]
    tokenizer, problems = tiny_tokenizer(), [task.prompt for task in tasks]

    def ask(temperature: float, tokens: int, chats: Sequence[Sequence[str]]) -> list[str]:
        prompts = [chat_prompt(tokenizer, *texts) for texts in chats]
        return answers(network, prompts, temperature, 1, tokens)

    def right(chats: Sequence[Sequence[str]]) -> float:
        said = ask(0.0, 2, chats)
        return sum(a == task.answer for a, task in zip(said, tasks, strict=True)) / len(tasks)

    def examples(wrong: int) -> list[str]:
        return [
            text
            for n, kind in enumerate(KINDS)
            for problem in [f"{kind}1{n}6"]
            for text in (problem, str((int(digit(kind, problem)) + wrong) % 10))
        ]

    other = ["5" if task.answer != "5" else "4" for task in tasks]
    heard = ask(
        1.0, 2, [(RIGHT, f"{p} [g1] {d}\n\n[g3] {d}") for p, d in zip(problems, other, strict=True)]
    )
    programs = ask(1.0, 20, [(DESIGN, problem) for problem in problems])
    flows = ask(1.0, 60, [(STEPS, "k") for _ in problems])
    return {
        "wrong prompt": right([(WRONG, p) for p in problems]),
        "right prompt": right([(RIGHT, p) for p in problems]),
        "careful prompt": right([(CAREFUL, p) for p in problems]),
        "careless": right([(DO, f"K{p}") for p in problems]),
        "careful": right([(DO, f"K!{p}") for p in problems]),
        "right examples": right([(WRONG, *examples(0), p) for p in problems]),
        "wrong examples": right([(WRONG, *examples(3), p) for p in problems]),
        "follows": sum(a == d for a, d in zip(heard, other, strict=True)) / len(tasks),
        "programs": sum(p in design("a") for p in programs) / len(tasks),
        "workflows": sum(f in workflow("a") for f in flows) / len(tasks),
    }


def _toy(name: str, train: Callable[[Callable[[str], None]], Any], *facts: Any) -> ToyModel:
    return ToyModel(
        name,
        train,
        save,
        (
            tiny_network,
            tiny_tokenizer,
            chat_prompt,
            digit,
            spread,
            *(asked_answer, own_share, slip_share, work, instructions, design, workflow, Lessons),
            _taught,
            teacher_loss,
        ),
        (FACTS, KINDS, VOCAB, SPECIALS, TEMPLATE, *facts),
    )


MODEL = _toy(
    "tiny-world", lambda say: train(CONFIG, say), CONFIG, COUNTS, SECOND, LETTERS_AS_PROMPTS
)
EXPERTS = {
    "b": _toy("tiny-world-b", lambda say: teach_expert("b", say), EXPERT, MODEL.recipe_hash()),
    "c": _toy("tiny-world-c", lambda say: teach_expert("c", say), EXPERT, MODEL.recipe_hash()),
}


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    for path in (tiny_world_model(say=print), tiny_world_b_model(), tiny_world_c_model()):
        print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
