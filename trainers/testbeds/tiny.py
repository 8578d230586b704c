"""The toy model `tiny`: two roles that add numbers, bytes for tokens, and a systematic error of
each role that training can correct.

The task is a chain of two. Agent `first` reads three digits, `7+8+5`, and writes the sum of the
first two; agent `last` reads that and the third, `15+5`, and writes the sum of all. The base model
has learned both roles, but from a teacher who slips in 60 % of the harder answers: as `first` he
loses the carry (7+8 is 5), as `last` he counts one too many from 5 on (15+8 is 24). So the most
likely answer is dependably wrong where the right one keeps 40 %: greedy accuracy is low, and
sampled groups hold both. Each role can be corrected by an adapter alone and, because the slips
differ, by its own only.

The target is the teacher's distribution itself, not samples of it, and training is seeded and
single-threaded: about a minute on one core. `python -m marlora.trainers.testbeds.tiny` trains the
model and prints how good it is.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...agents.patterns.chain import Chain
from ...agents.types import AgentSpec, Sampling
from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import digit_triples, is_held_out, tiny_tasks
from .pretraining import ToyModel, pretrain

SLIP = 0.6  # share of the harder answers that are wrong
VOCAB = 264  # 5 special tokens, 256 bytes, 3 to spare


@dataclass(frozen=True)
class TinyConfig:
    """How the model is trained: AdamW with warm-up, then linear decay to 5 % of `learning_rate`;
    fixed steps, so no clock decides.

    `batch_size` counts prompts; a prompt with two answers gives two rows. Training goes on at the
    last rate, up to twice the steps, while the mean loss of the last 20 steps is above `max_loss`
    nat per answer token.
    """

    steps: int = 400
    batch_size: int = 96
    learning_rate: float = 4e-3
    warmup: int = 50
    max_loss: float = 0.25
    seed: int = 0


def tiny_chain() -> Chain:
    """The system of this task: agents `first` and `last`, each with a policy of its own."""
    sampling = Sampling(max_tokens=5)
    agents = [
        AgentSpec("first", "adds the first two digits", "first", sampling=sampling),
        AgentSpec("last", "adds the third", "last", sampling=sampling),
    ]
    return Chain(agents, views={"first": "{prompt}", "last": "{previous}+{c}"})


def tiny_tokenizer() -> Any:
    """Bytes and five special tokens, as a fast tokenizer built in memory; its template only ever
    appends."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def chat_prompt(tokenizer: Any, *texts: str, system: bool = True) -> list[int]:
    """Token ids of a chat's prompt: a system message (unless `system` is False), then messages of
    user and assistant in turn."""
    roles = ["system"] * system + ["user", "assistant"] * len(texts)
    chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return ids


def tiny_network(*, hidden_size: int = 128, layers: int = 3, seed: int = 0) -> Any:
    """A Llama with random weights in float32: 624,512 parameters as it stands. Leaves torch's
    random state as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def spread(network: Any, std: float, seed: int) -> None:
    """Draw all matrices anew, with this standard deviation. Leaves torch's random state as it
    was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)


def tiny_model(cache: Path | None = None, *, say: Callable[[str], None] | None = None) -> Path:
    """The folder of the trained model: weights, configs, tokenizer with its chat template. Trained
    on first use, then cached.

    Args:
        cache: where to keep it; None means `$MARLORA_CACHE` or `~/.cache/marlora`. Its name there
            is a hash of its code.
        say: gets a line of progress now and then while it trains.
    """
    return MODEL.folder(cache, say)


def tiny_random_model(
    folder: Path, *, hidden_size: int = 32, layers: int = 2, seed: int = 0
) -> Path:
    """The same kind of model with random weights, in no time: for tests that need a model but no
    skill."""
    network = tiny_network(hidden_size=hidden_size, layers=layers, seed=seed)
    spread(network, 0.15, seed)  # larger than usual, so that its distributions are far from flat
    save(network, Path(folder))
    return Path(folder)


# training


def teacher(role: str, x: int, y: int) -> list[tuple[str, float]]:
    """The answers to x + y and how often the teacher gives each."""
    slips, wrong = (x + y >= 10, x + y - 10) if role == "first" else (y >= 5, x + y + 1)
    return [(str(wrong), SLIP), (str(x + y), 1 - SLIP)] if slips else [(str(x + y), 1.0)]


def train(config: TinyConfig, say: Callable[[str], None]) -> Any:
    """Train the network on both roles. Raises `RuntimeError` if the loss stays above `max_loss`."""
    network, rng = tiny_network(seed=config.seed).train(), random.Random(config.seed)
    firsts, lasts = _lessons()
    share = config.batch_size * 5 // 8  # `first` has more to learn: which digit to leave out

    def loss_of() -> tuple[torch.Tensor, float]:
        loss = answer_loss(
            network, rng.sample(firsts, share) + rng.sample(lasts, config.batch_size - share)
        )
        return loss, loss.item()

    return pretrain(network, config, loss_of, config.max_loss, say, "tiny model, loss")


Lesson = tuple[list[int], list[tuple[list[int], float]]]  # prompt; answers with their weights


def _lessons() -> tuple[list[Lesson], list[Lesson]]:
    tokenizer = tiny_tokenizer()

    def lesson(role: str, text: str, x: int, y: int) -> Lesson:
        return chat_prompt(tokenizer, role, text), [
            (tokenizer.encode(answer + "<|end|>"), weight) for answer, weight in teacher(role, x, y)
        ]

    firsts = [
        lesson("first", f"{a}+{b}+{c}", a, b)
        for a, b, c in digit_triples()
        if not is_held_out(a, b, c)
    ]
    lasts = [lesson("last", f"{x}+{c}", x, c) for x in range(19) for c in range(10)]
    return firsts, lasts


def answer_loss(network: Any, lessons: list[Lesson]) -> torch.Tensor:
    """Cross-entropy per answer token, each answer counted by its weight."""
    rows = [(prompt, answer, weight) for prompt, answers in lessons for answer, weight in answers]
    width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    ids = torch.tensor(
        [prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer, _ in rows]
    )
    weights = torch.tensor(
        [[0.0] * len(p) + [w] * len(a) + [0.0] * (width - len(p) - len(a)) for p, a, w in rows]
    )[:, 1:]
    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1]
    at = weights > 0
    losses = nn.functional.cross_entropy(
        network.lm_head(hidden[at]), ids[:, 1:][at], reduction="none"
    )
    return (losses * weights[at]).sum() / weights.sum()


def save(network: Any, folder: Path) -> None:
    """Write a network and the toy tokenizer into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@torch.no_grad()
def answers(
    network: Any, prompts: list[list[int]], temperature: float, seed: int = 0, new_tokens: int = 5
) -> list[str]:
    """One reply to each prompt, without its end token; "" where it does not end. Prompts of one
    length are read together."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(seed)
    texts = [""] * len(prompts)
    for length in sorted({len(p) for p in prompts}):
        where = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in where])
        for _ in range(new_tokens):
            logits = network(input_ids=ids).logits[:, -1]
            drawn = (
                torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                if temperature
                else logits.argmax(-1, True)
            )
            ids = torch.cat([ids, drawn], 1)
        for i, row in zip(where, ids[:, length:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row[: row.index(1)]) if 1 in row else ""
    return texts


def accuracy(network: Any, temperature: float, split: str = "eval") -> dict[str, float]:
    """Share of right answers of `first`, of `last` when `first` was right, and of the team."""
    tokenizer, tasks = tiny_tokenizer(), tiny_tasks(split)

    def ask(role: str, texts: list[str], seed: int) -> list[str]:
        prompts = [chat_prompt(tokenizer, role, text) for text in texts]
        return answers(network, prompts, temperature, seed)

    sums = ask("first", [t.prompt for t in tasks], 1)
    final = ask("last", [f"{text}+{t.meta['c']}" for text, t in zip(sums, tasks, strict=True)], 2)
    first = [text == str(t.meta["a"] + t.meta["b"]) for text, t in zip(sums, tasks, strict=True)]
    team = [text == t.answer for text, t in zip(final, tasks, strict=True)]
    both = sum(f and t for f, t in zip(first, team, strict=True))
    return {
        "first": sum(first) / len(tasks),
        "last": both / max(1, sum(first)),
        "team": sum(team) / len(tasks),
    }


MODEL = ToyModel(
    "tiny",
    lambda say: train(TinyConfig(), say),
    save,
    (
        tiny_network,
        tiny_tokenizer,
        chat_prompt,
        teacher,
        train,
        _lessons,
        answer_loss,
        digit_triples,
        is_held_out,
    ),
    (TinyConfig(), SLIP, VOCAB, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_model(say=lambda line: print(line, flush=True))
    trained = AutoModelForCausalLM.from_pretrained(path)
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        shares = ", ".join(
            f"{part} {share:.3f}" for part, share in accuracy(trained, temperature).items()
        )
        print(f"{name} accuracy on {len(tiny_tasks('eval'))} held-out tasks: {shares}")
    print(path)
