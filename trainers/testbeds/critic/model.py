"""The toy model `tiny-critic`: it solves tasks by the prompt that it is given, says what is wrong
with a prompt, and rewrites it, so that methods of feedback in words can be tried in minutes.

What it is asked and says stands in `teacher.py`: the model learns that distribution from
replies that are drawn from it. Its tokenizer knows bytes, and the tags and phrases of the methods'
prompts as one token each: so a question is forty tokens and not three hundred. Training is seeded
and single-threaded, some minutes on one core; `python -m marlora.trainers.testbeds.critic.model`
trains the model and tells what it does.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....agents.patterns.chain import Chain
from ....agents.text import tags
from ....agents.text.tags import inside
from ....agents.types import AgentSpec, Sampling
from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...feedback.rewriters import feedback_blocks
from ..pretraining import ToyModel, pretrain
from ..tiny import chat_prompt, spread, tiny_network
from ..word_tokenizer import word_tokenizer
from . import lessons, teacher
from .lessons import (
    NAME,
    NUMBERED,
    PROBLEMS,
    Asked,
    Lesson,
    Lessons,
    Questions,
    critic_tokenizer,
    criticism,
    rewriting,
)
from .teacher import AMOUNTS, EXPECTED, START, VALUES, replies

LONGEST = 20  # tokens of a reply, its end included
COUNTS: Mapping[str, int] = {  # lessons of a batch, by method of `Questions`
    "worked": 4,
    "judged": 5,
    "criticised": 8,
    "required": 5,
    "repeated": 4,
    "edited": 6,
    "edited_by_two": 4,
    "reasoned": 6,
    "reasoned_by_two": 4,
}
SECOND_COUNTS: Mapping[str, int] = {  # of the second part: more of what the first leaves unlearnt
    "worked": 14,
    "judged": 10,
    "criticised": 4,
    "required": 3,
    "repeated": 2,
    "edited": 4,
    "edited_by_two": 4,
    "reasoned": 4,
    "reasoned_by_two": 9,
}
ALIKE = (  # lessons of about one length, which are read together
    ("worked", "judged", "criticised", "required"),
    ("repeated", "edited", "reasoned"),
    ("edited_by_two", "reasoned_by_two"),
)
CIRCLES = 0.6  # radius of the circles on which the digits stand at the start


@dataclass(frozen=True)
class CriticConfig:
    """How the model is trained: AdamW with warm-up, then linear decay.

    `max_excess`: as of `ProgramsConfig`, in nats per reply.
    """

    steps: int = 500
    learning_rate: float = 5e-3
    warmup: int = 40
    max_excess: float = 1.6
    hidden_size: int = 64
    layers: int = 3
    init_std: float = 0.12
    seed: int = 0


SECOND = CriticConfig(steps=200, learning_rate=3e-3, warmup=10)


def tiny_critic_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


def critic_chain() -> Chain:
    """The system of this task: one worker, whose prompt is all wrong at the start."""
    spec = AgentSpec(NAME, "", START, policy="base", sampling=Sampling(temperature=0, max_tokens=2))
    return Chain([spec])


# training


def train(config: CriticConfig, say: Callable[[str], None]) -> Any:
    """Train the network on all roles, in two parts. Raises `RuntimeError` if it stays further than
    `max_excess` from its teacher."""
    network = _taught(critic_network(config), config, COUNTS, random.Random(config.seed), say)
    return _taught(network.train(), SECOND, SECOND_COUNTS, random.Random(config.seed + 1), say)


def _taught(
    network: Any,
    config: CriticConfig,
    counts: Mapping[str, int],
    rng: random.Random,
    say: Callable[[str], None],
) -> Any:
    questions, made = Questions(rng), Lessons(rng)

    def loss_of() -> tuple[torch.Tensor, float]:
        losses, excesses = [], []
        for names in ALIKE:
            asked = [getattr(questions, name)() for name in names for _ in range(counts[name])]
            loss, excess = teacher_loss(network, [made.of(each) for each in asked])
            losses.append(loss * len(asked) / sum(counts.values()))
            excesses.append(excess)
        return torch.stack(losses).sum(), max(excesses)

    return pretrain(
        network, config, loss_of, config.max_excess, say, "tiny critic, nat from its teacher"
    )


def critic_network(config: CriticConfig) -> Any:
    """The untrained network."""
    network = tiny_network(hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    tokenizer = critic_tokenizer()
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    spread(network, config.init_std, config.seed)
    circles = CIRCLES * torch.tensor(on_circles())
    weights = network.model.embed_tokens.weight
    with torch.no_grad():
        for words in ([*map(str, range(10))], *NUMBERED, PROBLEMS):
            ids = [tokenizer.encode(word)[0] for word in words]
            weights[ids, :10] = circles.repeat(len(words) // 10, 1)
            if len(words[0]) > 1:  # what kind of word it is, and its digit
                weights[ids, 10:] = weights[ids[0], 10:]
    return network.train()


def on_circles() -> list[list[float]]:
    """The ten digits as points on five circles: the sum of two modulo ten is then a product, which
    a gated layer learns in a tenth of the steps."""
    return [
        [turn(2 * math.pi * k * digit / 10) for k in range(1, 6) for turn in (math.cos, math.sin)]
        for digit in range(10)
    ]


def teacher_loss(network: Any, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the replies, with the teacher's shares as targets at every place: of each
    reply its sum by the root of its length, so that long ones do not drown the others. And by how
    much it exceeds the targets' entropy, KL(teacher | model), in nats per reply."""
    width = max(len(each.prompt) + len(each.reply) for each in lessons)
    rows = [each.prompt + each.reply for each in lessons]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = [
        (row, len(each.prompt) + n - 1, shares)
        for row, each in enumerate(lessons)
        for n, shares in enumerate(each.targets)
    ]
    hidden = network.model(input_ids=ids).last_hidden_state
    at = hidden[[row for row, _, _ in places], [column for _, column, _ in places]]
    log_shares = torch.log_softmax(network.lm_head(at), -1)
    told = [
        (place, token, share, len(lessons[row].reply) ** -0.5)
        for place, (row, _, shares) in enumerate(places)
        for token, share in shares.items()
    ]
    where, tokens, shares, roots = map(list, zip(*told, strict=True))
    costs = -log_shares[where, tokens] * torch.tensor(shares)
    excess = costs.detach().sum().item() + sum(share * math.log(share) for share in shares)
    return (costs * torch.tensor(roots)).sum() / len(lessons), excess / len(lessons)


def save(network: Any, folder: Path) -> None:
    """Write a network and its tokenizer into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network.save_pretrained(folder)
    critic_tokenizer().save_pretrained(folder)


# what it does


def abilities(network: Any, count: int = 150) -> dict[str, float]:
    """Of each role: the mean of log teacher(reply) - log model(reply) over replies of the teacher,
    in nats (0 is the teacher itself), and the share of sampled replies that the teacher gives."""
    found = {}
    for role in COUNTS:
        rng = random.Random(1)
        questions, made = Questions(rng), Lessons(rng)
        asked = [getattr(questions, role)() for _ in range(count)]
        with torch.no_grad():
            found[f"{role}, nats"] = teacher_loss(network, [*map(made.of, asked)])[1]
        said = sampled(network, made, asked)
        known = [text in replies(*question) for text, question in zip(said, asked, strict=True)]
        found[f"{role}, known"] = sum(known) / count
    return found


def helped(network: Any, feedback: str, count: int = 100) -> dict[str, float]:
    """Of fresh wrong answers: the share whose critique names the amount that was wanted, and of
    prompts that are rewritten by that critique the share that is right. 0.1 is chance.

    Args:
        feedback: own; shuffled: the critic is told the metric's words on another task; none: the
            editor is told nothing.
    """
    rng = random.Random(2)
    questions, made = Questions(rng), Lessons(rng)
    wanted, problems = rng.choices(range(10), k=count), [questions.problem() for _ in range(count)]
    words = [
        f"exact: 0\n{EXPECTED}{(int(problem[-1]) + amount) % 10}"
        for problem, amount in zip(problems, wanted, strict=True)
    ]
    told = [*words[1:], *words[:1]] if feedback == "shuffled" else words
    critiques = sampled(network, made, [*map(criticism, problems, told)])
    said = ["" if feedback == "none" else critique for critique in critiques]
    edits = [
        rewriting(VALUES[(amount + 1) % 10], problem, critique)
        for amount, problem, critique in zip(wanted, problems, said, strict=True)
    ]
    values = [inside(reply, "IMPROVED_VARIABLE") for reply in sampled(network, made, edits)]
    return {
        "critiques": sum(a.endswith(AMOUNTS[b]) for a, b in zip(said, wanted, strict=True)) / count,
        "rewrites": sum(a == VALUES[b] for a, b in zip(values, wanted, strict=True)) / count,
    }


@torch.no_grad()
def sampled(network: Any, lessons: Lessons, asked: Sequence[Asked], seed: int = 0) -> list[str]:
    """One reply to each question at temperature 1, without its end token; questions of one length
    are read together."""
    prompts, generator = [*map(lessons.prompt, asked)], torch.Generator().manual_seed(seed)
    end, texts = lessons.tokenizer.eos_token_id, [""] * len(prompts)
    for length in sorted({*map(len, prompts)}):
        where = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[n] for n in where])
        while ids.shape[1] < length + LONGEST and not (ids[:, length:] == end).any(1).all():
            chances = network(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        for n, row in zip(where, ids[:, length:].tolist(), strict=True):
            texts[n] = lessons.tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


MODEL = ToyModel(
    "tiny-critic",
    lambda say: train(CriticConfig(), say),
    save,
    (
        tiny_network,
        spread,
        chat_prompt,
        word_tokenizer,
        tags,
        feedback_blocks,
        teacher,
        lessons,
        on_circles,
        critic_network,
        teacher_loss,
        train,
        _taught,
    ),
    (CriticConfig(), COUNTS, SECOND, SECOND_COUNTS, ALIKE, CIRCLES, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_critic_model(say=lambda line: print(line, flush=True))
    print(path, abilities(AutoModelForCausalLM.from_pretrained(path)))
