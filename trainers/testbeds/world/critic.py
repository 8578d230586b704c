"""The toy model `tiny-world-critic`: it says what is wrong with the prompts of the workers of
`tiny-world`, and rewrites them, so that methods of feedback in words can be run on its task set.

**Critic** (system prompt `say`). Told a task, an output and the metric's words on it, it names the
letter that the task's kind wants, `B` for `b472`, in `READS` of its replies, else any letter of a
kind; of a right output it says `ok`. Told a turn and what was said of its output, it repeats that.

**Editor** (`edit`). Told a prompt and what was said of it, or what the metric said of some tasks,
it writes another: where one letter is wanted that one or `K`, where several are wanted mostly `K`
(`rewritten`), and with nothing said any letter. It asks for care in `CARES` of its prompts,
whatever it is told: it does not know what care is worth, nor what comes of a prompt. As `guess` it
draws.

These are the shares of its teacher (`READS` and so on), whose distribution is the target. Training
is seeded and single-threaded, about a minute on one core; `python -m
marlora.trainers.testbeds.world.critic` trains the model and tells what it does.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....agents.text.tags import block, nested
from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ....rollouts.tasks.toy import KINDS, digit
from ..pretraining import ToyModel, pretrain
from ..tiny import chat_prompt, spread, tiny_network
from ..word_tokenizer import word_tokenizer
from .lessons import CARE, LETTERS, OWN

SAY, EDIT, GUESS, OK = "say", "edit", "guess", "ok"
READS, CARES = 0.7, 0.35
ONE, SEVERAL = 0.5, 0.8  # shares of `K` where one letter is wanted, and where several are
MAX_FEEDBACK = 4
EXPECTED = "The expected output is: "
NAMES = ("first", "last")
Shares = Mapping[str, float]

TAGS = (
    *("CONVERSATION", "TASK", "PREDICTION", "RESULT", "SYSTEM", "INPUT", "OUTPUT", "FEEDBACK"),
    *(f"FEEDBACK_{n}" for n in range(1, MAX_FEEDBACK + 1)),
    *("TEXT", "VARIABLE", "IMPROVED_VARIABLE", "VARIABLES", "VALUE", "GRAPH", "SUGGESTION"),
)
HEADS = tuple(
    f"{name}.prompt: the text '{name}.prompt' of the agent '{name}'; a text\n" for name in NAMES
)
NODES = ("n0 = first(the task) with first.prompt\n", "n1 = last(n0) with last.prompt\n")
AROUND = ('{"reasoning": "', '", "suggestion": {"first.prompt": "', '", "last.prompt": "', '"}}')
PHRASES = (*HEADS, *NODES, *AROUND, "exact: 0\n" + EXPECTED, "exact: 1\n" + EXPECTED, " [g1] ")


def words() -> list[str]:
    """What is one token besides bytes: tags with and without a new line, and phrases; longer ones
    first."""
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    found = [*tags, *(f"{tag}\n" for tag in tags), *PHRASES]
    return sorted(found, key=lambda word: (-len(word), word))


def critic_tokenizer() -> Any:
    """Bytes, `words()` and five special tokens."""
    return word_tokenizer(words())


# the teacher


def named(task: str, right: bool) -> Shares:
    """What a critic says of an output of this task."""
    if right:
        return {OK: 1.0}
    letters = [kind.upper() for kind in KINDS]
    return {
        letter: READS * (letter == task[0].upper()) + (1 - READS) / len(letters)
        for letter in letters
    }


def rewritten(targets: Sequence[str]) -> Shares:
    """The letter that an editor writes by the letters that are asked for."""
    several = sorted(set(targets))
    if not several:
        return dict.fromkeys(LETTERS, 1 / len(LETTERS))
    own = ONE if len(several) == 1 else SEVERAL
    return {OWN: own, **{letter: (1 - own) / len(several) for letter in several}}


# lessons


@dataclass(frozen=True)
class Asked:
    """A question and the pieces of a reply: texts, and choices with their shares."""

    system: str
    text: str
    reply: Sequence[str | Shares]


class Questions:
    """Questions in the forms of the methods, drawn without end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def task(self) -> str:
        return f"{self.rng.choice([*KINDS])}{self.rng.randrange(1000):03}"

    def prompt(self) -> str:
        return self.rng.choice(LETTERS) + self.rng.choice(["", CARE])

    def digit(self) -> str:
        return str(self.rng.randrange(10))

    def result(self, task: str, right: bool) -> str:
        """The metric's words."""
        return f"exact: {int(right)}\n{EXPECTED}{digit(task[0], task)}"

    def turn(self, task: str) -> str:
        """A worker's turn as blocks: the first one's, or the last one's, which read it."""
        heard = f" [g1] {self.digit()}" if self.rng.random() < 0.5 else ""
        texts = (("SYSTEM", self.prompt()), ("INPUT", task + heard), ("OUTPUT", self.digit()))
        return "\n".join(block(*each) for each in texts)

    def words(self) -> str:
        """What was said of an output."""
        return self.rng.choice([OK, *(kind.upper() for kind in KINDS)])

    def base(self) -> Asked:
        task, right = self.task(), self.rng.random() < 0.25
        said = digit(task[0], task) if right else self.digit()
        blocks = (("TASK", task), ("PREDICTION", said), ("RESULT", self.result(task, right)))
        text = nested("CONVERSATION", "\n".join(block(*each) for each in blocks))
        return Asked(SAY, text, [named(task, right)])

    def chain(self) -> Asked:
        said = self.words()
        turn = nested("CONVERSATION", self.turn(self.task()))
        return Asked(SAY, f"{turn}\n{block('FEEDBACK', said)}", [said])

    def rewrite(self) -> Asked:
        """One prompt, by what was said of some of its turns."""
        said = [self.words() for _ in range(self.rng.randint(0, MAX_FEEDBACK))]
        shown = [
            f"{nested('CONVERSATION', self.turn(self.task()))}\n{block('TEXT', each)}"
            for each in said
        ]
        system, letters = self._editor([each for each in said if each != OK])
        return Asked(
            system,
            f"{block('VARIABLE', self.prompt())}\n{_numbered(shown)}" + self._end(),
            ["<IMPROVED_VARIABLE>", letters, _cares("</IMPROVED_VARIABLE>")],
        )

    def graph(self) -> Asked:
        """Both prompts at once, by the graphs of some runs and what the metric said of them."""
        shown, targets = [], []
        for _ in range(self.rng.randint(1, MAX_FEEDBACK)):
            task = self.task()
            targets.append(task[0].upper())
            nodes = "\n".join(node + block("TEXT", self.digit()) for node in NODES)
            context = f"{block('TASK', task)}\n{nested('GRAPH', nodes)}"
            told = block("TEXT", self.result(task, False))
            shown.append(f"{nested('CONVERSATION', context)}\n{told}")
        values = "\n".join(head + block("VALUE", self.prompt()) for head in HEADS)
        system, letters = self._editor(targets)
        begin, first, last, end = AROUND
        reply: list[str | Shares] = [
            begin,
            first,
            letters,
            _cares(last),
            letters,
            _cares(end),
            "</SUGGESTION>",
        ]
        return Asked(
            system,
            f"{nested('VARIABLES', values)}\n{_numbered(shown)}" + self._end(),
            ["<SUGGESTION>", *reply],
        )

    def _editor(self, targets: Sequence[str]) -> tuple[str, Shares]:
        """An editor's system prompt, and the letters that it writes."""
        guesses = self.rng.random() < 0.15
        return (GUESS, rewritten([])) if guesses else (EDIT, rewritten(targets))

    def _end(self) -> str:
        return self.rng.choice(["", "\n"])


def _cares(then: str) -> Shares:
    """What comes after a letter: care, or at once what comes then."""
    return {CARE + then: CARES, then: 1 - CARES}


def _numbered(shown: Sequence[str]) -> str:
    return "\n".join(nested(f"FEEDBACK_{n}", each) for n, each in enumerate(shown, 1))


# training


@dataclass(frozen=True)
class CriticConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    questions of each form. `max_excess`: as of `WorldConfig`."""

    steps: int = 300
    base: int = 8
    chain: int = 4
    rewrite: int = 8
    graph: int = 8
    learning_rate: float = 4e-3
    warmup: int = 30
    max_excess: float = 0.4
    hidden_size: int = 64
    layers: int = 3
    init_std: float = 0.1
    seed: int = 0


FORMS = ("base", "chain", "rewrite", "graph")  # methods of `Questions`
Lesson = tuple[list[int], dict[int, dict[int, float]]]  # tokens; by place, what may come next


def lesson(tokenizer: Any, asked: Asked, rng: random.Random) -> Lesson:
    """A question with a reply drawn from the teacher's, and the shares of what may stand at each
    of its places. The texts of a choice differ in their first token."""
    ids, targets = chat_prompt(tokenizer, asked.system, asked.text), dict[int, dict[int, float]]()
    for piece in [*asked.reply, "<|end|>"]:
        shares = {piece: 1.0} if isinstance(piece, str) else piece
        (text,) = rng.choices([*shares], [*shares.values()])
        firsts = {tokenizer.encode(each)[0]: share for each, share in shares.items() if share}
        for n, token in enumerate(tokenizer.encode(text)):
            targets[len(ids) - 1] = {token: 1.0} if n else firsts
            ids.append(token)
    return ids, targets


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
        for form in FORMS:
            asked = [getattr(questions, form)() for _ in range(getattr(config, form))]
            loss, excess = lessons_loss(network, [lesson(tokenizer, each, rng) for each in asked])
            losses.append(loss)
            excesses.append(excess)
        return torch.stack(losses).sum(), max(excesses)

    return pretrain(network, config, loss_of, config.max_excess, say, "tiny world critic, nat")


def save(network: Any, folder: Path) -> None:
    """Write a network and the critic's tokenizer into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network.save_pretrained(folder)
    critic_tokenizer().save_pretrained(folder)


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
FACTS = (KINDS, LETTERS, OWN, CARE, SAY, EDIT, GUESS, OK, READS, CARES, ONE, SEVERAL, MAX_FEEDBACK)
MODEL = ToyModel(
    "tiny-world-critic",
    lambda say: train(CONFIG, say),
    save,
    (
        *(words, critic_tokenizer, named, rewritten, Asked, Questions, _numbered, lesson),
        *(lessons_loss, train, block, nested, digit, tiny_network, chat_prompt, spread),
        word_tokenizer,
    ),
    (CONFIG, FACTS, TAGS, PHRASES, SPECIALS, TEMPLATE),
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
