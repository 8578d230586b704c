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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....agents.patterns.chain import Chain
from ....agents.text import tags
from ....agents.types import AgentSpec, Sampling
from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...feedback.rewriters import feedback_blocks
from ..pretraining import ToyModel, pretrain
from ..tiny import chat_prompt, spread, tiny_network
from . import lessons, teacher
from .lessons import NAME, NUMBERED, Asked, Questions, critic_tokenizer, drawn
from .teacher import START, replies

LONGEST = 20  # tokens of a reply, its end included
ROLES = ("worked", "judged", "said", "edited", "edited_by_two")  # methods of `Questions`
CIRCLES = 0.6  # radius of the circles on which the digits stand at the start


@dataclass(frozen=True)
class CriticConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    answers of workers, judges and critics, and of values rewritten by one feedback and by two.

    `max_excess`: as of `ProgramsConfig`, in nats per reply.
    """

    steps: int = 600
    worked: int = 20
    judged: int = 12
    said: int = 36
    edited: int = 24
    edited_by_two: int = 6
    learning_rate: float = 6e-3
    warmup: int = 40
    max_excess: float = 2.0
    hidden_size: int = 64
    layers: int = 3
    init_std: float = 0.12
    seed: int = 0


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
    """Train the network on all roles. Raises `RuntimeError` if it stays further than `max_excess`
    from its teacher."""
    network = critic_network(config)
    tokenizer, rng = critic_tokenizer(), random.Random(config.seed)
    questions = Questions(rng)
    kinds = [(getattr(questions, role), getattr(config, role)) for role in ROLES]

    def loss_of() -> tuple[torch.Tensor, float]:
        parts = [
            reply_loss(network, tokenizer, [make() for _ in range(count)], rng)
            for make, count in kinds
        ]
        return torch.stack([loss for loss, _ in parts]).sum(), max(e for _, e in parts)

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
        for words in ([*map(str, range(10))], *NUMBERED):
            ids = [tokenizer.encode(word)[0] for word in words]
            weights[ids, :10] = circles
            if words in NUMBERED:  # what kind of word it is, and its digit
                weights[ids, 10:] = weights[ids[0], 10:]
    return network.train()


def on_circles() -> list[list[float]]:
    """The ten digits as points on five circles: the sum of two modulo ten is then a product, which
    a gated layer learns in a tenth of the steps."""
    return [
        [turn(2 * math.pi * k * digit / 10) for k in range(1, 6) for turn in (math.cos, math.sin)]
        for digit in range(10)
    ]


def reply_loss(
    network: Any, tokenizer: Any, asked: Sequence[Asked], rng: random.Random
) -> tuple[torch.Tensor, float]:
    """Cross-entropy per token of replies that are drawn from the teacher, and by how much it
    exceeds that of the teacher itself, per reply: an unbiased estimate of KL(teacher | model)."""
    rows, entropy = [], 0.0
    for question in asked:
        reply, share = drawn(question, rng)
        entropy -= math.log(share)
        rows.append((prompt_ids(tokenizer, question), tokenizer.encode(reply + "<|end|>")))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
    at = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (prompt, reply) in enumerate(rows):
        at[row, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1]
    loss = nn.functional.cross_entropy(network.lm_head(hidden[at]), ids[:, 1:][at])
    return loss, (loss.item() * int(at.sum()) - entropy) / len(rows)


def prompt_ids(tokenizer: Any, asked: Asked) -> list[int]:
    """Token ids of a chat's prompt; without a system message where that is empty."""
    return chat_prompt(tokenizer, *(text for text in asked if text), system=bool(asked[0]))


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
    tokenizer, found = critic_tokenizer(), {}
    for role in ROLES:
        rng = random.Random(1)
        questions = Questions(rng)
        asked = [getattr(questions, role)() for _ in range(count)]
        with torch.no_grad():
            found[f"{role}, nats"] = reply_loss(network, tokenizer, asked, rng)[1]
        prompts = [prompt_ids(tokenizer, question) for question in asked]
        said = sampled(network, tokenizer, prompts)
        known = [text in replies(*question) for text, question in zip(said, asked, strict=True)]
        found[f"{role}, known"] = sum(known) / count
    return found


@torch.no_grad()
def sampled(network: Any, tokenizer: Any, prompts: Sequence[list[int]], seed: int = 0) -> list[str]:
    """One reply to each prompt at temperature 1, without its end token."""
    generator, texts = torch.Generator().manual_seed(seed), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        while ids.shape[1] < len(prompt) + LONGEST and ids[0, -1] != tokenizer.eos_token_id:
            chances = network(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        texts.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
    return texts


MODEL = ToyModel(
    "tiny-critic",
    lambda say: train(CriticConfig(), say),
    save,
    (
        tiny_network,
        spread,
        chat_prompt,
        tags,
        feedback_blocks,
        teacher,
        lessons,
        on_circles,
        critic_network,
        reply_loss,
        prompt_ids,
        train,
    ),
    (CriticConfig(), CIRCLES, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_critic_model(say=lambda line: print(line, flush=True))
    print(path, abilities(AutoModelForCausalLM.from_pretrained(path)))
