"""The toy model `tiny-world-critic`: it says what is wrong with the prompts of the workers of
`tiny-world`, and rewrites them, so that methods of feedback in words can be run on its task set.

What it is asked and what its teacher replies stands in `questions.py`; the teacher's distribution
is the target. Training is seeded and single-threaded, some minutes on one core; `python -m
marlora.trainers.testbeds.world.critic` trains the model and tells what it does.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ..pretraining import ToyModel, pretrain
from ..tiny import chat_prompt, spread, tiny_network
from .questions import FACTS, SOURCES, Asked, Piece, Questions, Shares, critic_tokenizer

# training


@dataclass(frozen=True)
class CriticConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    questions of each form. `max_excess`: as of `WorldConfig`."""

    steps: int = 300
    learning_rate: float = 4e-3
    warmup: int = 30
    max_excess: float = 0.4
    hidden_size: int = 64
    layers: int = 3
    init_std: float = 0.1
    seed: int = 0


FORMS = {  # methods of `Questions`, and how many of each are in a batch
    **{"base": 5, "chain": 3, "judge": 4, "judged": 3, "node": 3, "state": 3},
    **{"rewrite": 6, "evolve": 5, "instruct": 5, "role": 4, "graph": 5, "meta": 2},
}
Lesson = tuple[list[int], dict[int, dict[int, float]]]  # tokens; by place, what may come next


def lesson(tokenizer: Any, asked: Asked, rng: random.Random) -> Lesson:
    """A question with a reply drawn from the teacher's, and the shares of what may stand at each
    of its places. The texts of a choice differ in their first token."""
    ids, targets = chat_prompt(tokenizer, asked.system, asked.text), dict[int, dict[int, float]]()
    for piece in [*asked.reply, "<|end|>"]:
        text, shares = chosen(piece, rng)
        firsts = {tokenizer.encode(each)[0]: share for each, share in shares.items() if share}
        for n, token in enumerate(tokenizer.encode(text)):
            targets[len(ids) - 1] = {token: 1.0} if n else firsts
            ids.append(token)
    return ids, targets


def chosen(piece: Piece, rng: random.Random) -> tuple[str, Shares]:
    """A text of a piece of a reply, and the shares that it is drawn from."""
    if isinstance(piece, tuple):
        return piece
    shares = {piece: 1.0} if isinstance(piece, str) else piece
    (text,) = rng.choices([*shares], [*shares.values()])
    return text, shares


def lessons_loss(network: Any, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, float]:
    """Cross-entropy of what comes next, per reply, and by how much it exceeds the teacher's
    entropy."""
    width = max(len(ids) for ids, _ in lessons)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in lessons])
    places = [(row, at, next_) for row, (_, t) in enumerate(lessons) for at, next_ in t.items()]
    hidden = network.model(input_ids=ids).last_hidden_state
    rows, columns = torch.tensor([(row, at) for row, at, _ in places]).T
    logs = torch.log_softmax(network.lm_head(hidden[rows, columns]), -1)
    targets = torch.zeros_like(logs)
    for number, (_, _, shares) in enumerate(places):
        targets[number, [*shares]] = torch.tensor([*shares.values()])
    whole = -(targets * logs).sum()
    entropy = -(targets * targets.clamp(min=1e-30).log()).sum()
    return whole / len(lessons), float(whole.detach() - entropy) / len(lessons)


def train(config: CriticConfig, say: Callable[[str], None]) -> Any:
    """Train the network in both roles. Raises `RuntimeError` if it stays further than `max_excess`
    from its teacher."""
    network = tiny_network(hidden_size=config.hidden_size, layers=config.layers, seed=config.seed)
    tokenizer, rng = critic_tokenizer(), random.Random(config.seed)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    spread(network.train(), config.init_std, config.seed)
    questions = Questions(rng)

    def loss_of() -> tuple[torch.Tensor, float]:
        losses, excesses = [], []
        for form, count in FORMS.items():
            asked = [getattr(questions, form)() for _ in range(count)]
            loss, excess = lessons_loss(network, [lesson(tokenizer, each, rng) for each in asked])
            losses.append(loss)
            excesses.append(excess)
        return torch.stack(losses).sum(), max(excesses)

    return pretrain(network, config, loss_of, config.max_excess, say, "tiny world critic, nat")


def save(network: Any, folder: Path, tokenizer: Callable[[], Any] = critic_tokenizer) -> None:
    """Write a network and its tokenizer into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@torch.no_grad()
def likely(network: Any, asked: Asked, rng: random.Random) -> list[dict[str, float]]:
    """What the model gives each text of a choice in a reply, choice by choice, after a reply that
    is drawn from the teacher's up to there."""
    tokenizer = critic_tokenizer()
    ids, targets = lesson(tokenizer, asked, rng)
    shares = network(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
    return [
        {tokenizer.decode([token]): float(shares[at, token]) for token in targets[at]}
        for at in targets
        if len(targets[at]) > 1
    ]


CONFIG = CriticConfig()
MODEL = ToyModel(
    "tiny-world-critic",
    lambda say: train(CONFIG, say),
    save,
    (*SOURCES, lesson, chosen, lessons_loss, train, tiny_network, chat_prompt, spread),
    (CONFIG, FORMS, FACTS, SPECIALS, TEMPLATE),
)
tiny_world_critic_model = MODEL.folder


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_world_critic_model(say=lambda line: print(line, flush=True))
    trained = AutoModelForCausalLM.from_pretrained(path)
    drawn = random.Random(1)
    for form in FORMS:
        example = getattr(Questions(drawn), form)()
        print(path, form, example.text[-60:], likely(trained, example, drawn))
