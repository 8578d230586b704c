"""The toy model `tiny-edits`: it proposes programs for the executor of `tiny-programs`, so that
searches over programs can be tried in minutes with a model as their proposer.

**Programs** ask the executor by a letter for each kind of problem: with `ABA` between the quotes of
`FIRST`, problems of kinds a and c are answered as A says. `program_tasks` want `ABC`; `AAA` is
right for a third of them. An edit, of three characters, puts in a letter (`b=B`); `!!!` calls what
does not exist.

**Editor** (system prompt `edit`). Told a task that a program failed and the program, in AFlow's
tags, it replies with an edit. In 65 % of its replies it reads of which kind the task is and puts in
the letter which that kind wants, for this it was taught. The others, and all where no failure is
shown, are drawn from all edits: a tenth `!!!`, else a kind and a letter at random. So some do
nothing, and some do harm.

**Moderator** (`compare`) and **judge** (`decide`). Told a failure and two edits they name, in 90 %,
the first that puts in the right letter; without one the moderator goes on, the judge guesses.

**Inventor** (`invent`). Told a program alone, it replies with another in ADAS's JSON; it knows of
40 % of its letters that the kind wants them, for ADAS shows it no task to read that from. Asked
again it repeats itself, broken calls mended.

These are the shares of its teacher, whose distribution itself is the target wherever there is a
choice. All texts of a kind are of one length: this is easier to copy from. Training is seeded and
single-threaded; `python -m marlora.trainers.testbeds.edits` trains it and tells what it does.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...rollouts.tasks.toy import KINDS, digit
from .pretraining import ToyModel, pretrain
from .tiny import VOCAB, answers, chat_prompt, save, spread, tiny_network, tiny_tokenizer

LETTERS = [kind.upper() for kind in KINDS]
MENDS, KNOWS, JUDGES = 0.65, 0.4, 0.9
COPY = "copy"  # the system prompt of lessons in copying
BROKEN, BREAKS = "!!!", 0.1  # the edit that calls what does not exist, and its share
UNEDITED = "---"  # stands for an edit where a program is shown that nobody has edited
EDIT, COMPARE, DECIDE, INVENT = "edit", "compare", "decide", "invent"  # system prompts
# what an inventor is asked below a program, and then in the same chat; see `asked`
ANOTHER, MEND = "Invent a new program", "Mend the broken call"
NEW, SURE = "Is the program new?", "Is there a mistake?"
LONGEST = 130  # tokens of a reply, its end included
Shares = Mapping[str, float]


def program(letters: str) -> str:
    """The program that asks for problems of the kinds a, b and c by these letters."""
    return f"await custom('{letters}'['abc'.find(problem[0])])"


FIRST, BEST = program("AAA"), program("ABC")


def edited(letters: str, edit: str) -> tuple[str, str]:
    """(the letters, the program) after an edit."""
    if edit == BROKEN:
        return letters, program(letters).replace("custom", "wizard")
    place = "abc".index(edit[0])
    letters = letters[:place] + edit[2] + letters[place + 1 :]
    return letters, program(letters)


@dataclass(frozen=True)
class EditsConfig:
    """How the model is trained: AdamW with warm-up, then linear decay, on batches of so many
    lessons of each kind (`LESSONS`), whose losses per reply count so much.

    `max_excess`: the mean of KL(teacher | model) over the last 20 steps, in nats per reply of the
    kind that is furthest away, at which training is done; at most twice `steps`. init_std: of all
    matrices at the start.
    """

    steps: int = 360
    batch: tuple[int, ...] = (10, 2, 4, 5, 3, 4)
    weights: tuple[float, ...] = (1, 0.2, 0.5, 0.5, 0.5, 0.2)
    learning_rate: float = 4e-3
    warmup: int = 20
    max_excess: float = 1.0
    hidden_size: int = 96
    layers: int = 2
    init_std: float = 0.1
    seed: int = 0


def tiny_edits_model(
    cache: Path | None = None, *, say: Callable[[str], None] | None = None
) -> Path:
    """The folder of the trained model. Trained on first use, then cached; arguments as of
    `tiny_model`."""
    return MODEL.folder(cache, say)


# the teacher


@dataclass(frozen=True)
class Failure:
    """A task that a program failed: the problem, what was wanted and what was said."""

    problem: str
    right: int
    said: int

    def __str__(self) -> str:
        """As `case` of `methods/workflow_search/experience.py` puts it."""
        return (
            f"Question: {self.problem}\nRight answer: {self.right}\n"
            f"Answer of the program: {self.said}"
        )

    @property
    def fix(self) -> str:
        """The edit that mends it."""
        return f"{self.problem[0]}={self.problem[0].upper()}"


def unread(known: float = 0.0) -> dict[str, float]:
    """Edits of one who reads no failure; a share `known` of the letters is what the kind wants."""
    edits = {BROKEN: BREAKS}
    for kind in KINDS:
        for letter in LETTERS:
            share = known * (letter == kind.upper()) + (1 - known) / len(LETTERS)
            edits[f"{kind}={letter}"] = (1 - BREAKS) * share / len(KINDS)
    return edits


def edits(failure: Failure | None) -> dict[str, float]:
    """An editor's edits."""
    if failure is None:
        return unread()
    shares = {edit: (1 - MENDS) * share for edit, share in unread().items()}
    shares[failure.fix] += MENDS
    return shares


def verdicts(mends: Sequence[bool], decisive: bool) -> dict[str, float]:
    """What a moderator, or a `decisive` judge, says of two edits that mend a failure or do not."""
    words = ["affirmative", "negative"] + ["No"] * (not decisive)
    if not any(mends) and decisive:
        return dict.fromkeys(words, 1 / len(words))
    best = words[mends.index(True)] if any(mends) else "No"
    return {word: JUDGES if word == best else (1 - JUDGES) / (len(words) - 1) for word in words}


def reply_of(edit: str, text: str) -> str:
    """An editor's reply."""
    return f"<modification>{edit}</modification>\n<graph>{text}</graph>\n<prompt></prompt>"


def invention(edit: str, text: str) -> str:
    """An inventor's reply."""
    return json.dumps({"thought": edit, "name": edit, "code": text})


def asked(what: str, text: str) -> str:
    """An inventor's first prompt. From a letter of the program to its copy it is as far as in an
    editor's chat, and as it is where an inventor is asked again: one way to copy does for all."""
    return f"{invention(UNEDITED, text)}\n{what}"


# lessons

Lesson = tuple[list[int], dict[int, dict[int, float]]]  # tokens; by place, what may come next


@functools.cache
def _tokenizer() -> Any:
    return tiny_tokenizer()


def lesson(texts: Sequence[str], *pieces: tuple[str, Shares | None]) -> Lesson:
    """A chat's prompt and a reply in pieces: certain ones, and single characters with the shares
    of what might stand there."""
    tokenizer = _tokenizer()
    ids, targets = chat_prompt(tokenizer, *texts), dict[int, dict[int, float]]()
    for text, shares in pieces:
        for token in tokenizer.encode(text):
            chances = {tokenizer.encode(c)[0]: p for c, p in shares.items()} if shares else {}
            targets[len(ids) - 1] = chances or {token: 1.0}
            ids.append(token)
    return ids, targets


def drawn(rng: random.Random, shares: Shares) -> str:
    return rng.choices([*shares], [*shares.values()])[0]


def in_pieces(edit: str, shares: Shares) -> list[tuple[str, Shares | None]]:
    """An edit as what is chosen in it: its first character, and a letter."""
    firsts, nexts = dict[str, float](), dict[str, float]()
    for each, share in shares.items():
        firsts[each[0]] = firsts.get(each[0], 0) + share
        if each[0] == edit[0]:
            nexts[each[2]] = share
    letters = {char: share / sum(nexts.values()) for char, share in nexts.items()}
    return [(edit[0], firsts), (edit[1], None), (edit[2], letters)]


def some_letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=3))


def some_failure(rng: random.Random) -> Failure:
    """A failed task: another kind was asked for than the problem wants."""
    problem = f"{rng.choice([*KINDS])}{rng.randrange(1000):03}"
    wrong = rng.choice([kind for kind in KINDS if kind != problem[0]])
    return Failure(problem, int(digit(problem[0], problem)), int(digit(wrong, problem)))


def edit_lesson(rng: random.Random, whole: bool = False) -> Lesson:
    """An edit, up to the last letter of its program unless `whole`: of a program as it stands, or
    as another's edit has left it."""
    letters = some_letters(rng)
    failure = some_failure(rng) if rng.random() < 0.85 else None
    before, text = UNEDITED, program(letters)
    if rng.random() < 0.4:
        kind = rng.choice([*KINDS])
        own = f"{kind}={letters['abc'.index(kind)]}"
        before = BROKEN if rng.random() < 0.1 else own
        text = edited(letters, before)[1]
    shares = edits(failure)
    edit = drawn(rng, shares)
    begin, end = reply_of(edit, edited(letters, edit)[1]).split(edit)
    rest = end + "<|end|>" if whole else end[: end.index("['abc'")]
    asked = f"{failure or 'none'}\n{reply_of(before, text)}"
    return lesson([EDIT, asked], (begin, None), *in_pieces(edit, shares), (rest, None))


def whole_edit_lesson(rng: random.Random) -> Lesson:
    return edit_lesson(rng, whole=True)


def verdict_lesson(rng: random.Random) -> Lesson:
    failure, letters = some_failure(rng), some_letters(rng)
    pair = [drawn(rng, edits(failure)) for _ in range(2)]
    decisive = rng.random() < 0.3
    shares = verdicts([edit == failure.fix for edit in pair], decisive)
    word = drawn(rng, shares)
    firsts = {each[0]: share for each, share in shares.items()}
    shown = "\n".join([str(failure), *(reply_of(e, edited(letters, e)[1]) for e in pair)])
    role = DECIDE if decisive else COMPARE
    return lesson([role, shown], (word[0], firsts), (word[1:] + "<|end|>", None))


def invent_lesson(rng: random.Random) -> Lesson:
    letters, shares = some_letters(rng), unread(KNOWS)
    edit = drawn(rng, shares)
    begin, *rest = invention(edit, edited(letters, edit)[1]).split(edit)
    end = edit.join(rest) + "<|end|>"
    shown = asked(ANOTHER, program(letters))
    return lesson([INVENT, shown], (begin, None), *in_pieces(edit, shares), (end, None))


def again_lesson(rng: random.Random) -> Lesson:
    """An inventor that is asked again, or told of a program that went wrong."""
    letters = some_letters(rng)
    edit = BROKEN if rng.random() < 0.4 else drawn(rng, unread())
    text = edited(letters, edit)[1]
    said, final = invention(edit, text), invention(edit, text.replace("wizard", "custom"))
    first = [asked(ANOTHER, program(letters)), said, NEW]
    chat = rng.choice([first, first, [*first, final, SURE]])
    if edit == BROKEN and rng.random() < 0.3:
        chat = [asked(MEND, text)]
    return lesson([INVENT, *chat], (final + "<|end|>", None))


def copy_lesson(rng: random.Random) -> Lesson:
    """A text to be copied from as far away as a program's letters are in the other lessons. They
    hold three letters to copy, this one a hundred: it is from here that copying is learnt."""
    text = "".join(rng.choices("ABCabc=!-", k=len(reply_of(UNEDITED, FIRST))))
    return lesson([COPY, text], (text + "<|end|>", None))


EDITING = (edit_lesson, whole_edit_lesson, verdict_lesson)
LESSONS = (*EDITING, invent_lesson, again_lesson, copy_lesson)


# training


def train(config: EditsConfig, say: Callable[[str], None]) -> Any:
    """Train the network on all roles. Raises `RuntimeError` if it stays further than `max_excess`
    from its teacher."""
    network = tiny_network(
        hidden_size=config.hidden_size, layers=config.layers, seed=config.seed
    ).train()
    spread(network, config.init_std, config.seed)
    rng = random.Random(config.seed)

    def loss_of() -> tuple[torch.Tensor, float]:
        losses, excesses = [], []
        for make, count, weight in zip(LESSONS, config.batch, config.weights, strict=True):
            loss, excess = shares_loss(network, [make(rng) for _ in range(count)])
            losses.append(weight * loss)
            excesses.append(excess)
        return torch.stack(losses).sum(), max(excesses)

    return pretrain(
        network, config, loss_of, config.max_excess, say, "tiny edits, nat from its teacher"
    )


def shares_loss(network: Any, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, float]:
    """Cross-entropy of what comes next, per reply, and by how much it exceeds the teacher's
    entropy."""
    width = max(len(ids) for ids, _ in lessons)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in lessons])
    rows = [(row, place) for row, (_, targets) in enumerate(lessons) for place in targets]
    chances = [nexts for _, targets in lessons for nexts in targets.values()]
    target = torch.zeros(len(rows), VOCAB)
    for at, nexts in enumerate(chances):
        for token, share in nexts.items():
            target[at, token] = share
    hidden = network.model(input_ids=ids).last_hidden_state
    at_rows, at_places = torch.tensor(rows).T
    whole = nn.functional.cross_entropy(
        network.lm_head(hidden[at_rows, at_places]), target, reduction="sum"
    )
    entropy = -sum(p * math.log(p) for nexts in chances for p in nexts.values() if p)
    return whole / len(lessons), (float(whole.detach()) - entropy) / len(lessons)


# what it does


def shares(network: Any, count: int = 30) -> dict[str, float]:
    """Of sampled replies: an editor's that are one of the grammar, and that mend the failure; the
    same without one to read, by chance; an inventor's that are one of the grammar, that put in what
    the kind wants, that repeat the last, that mend a call; moderators' that name the right side."""
    rng, tokenizer = random.Random(1), tiny_tokenizer()

    def ask(seed: int, chats: Sequence[Sequence[str]], tokens: int = LONGEST) -> list[str]:
        return answers(network, [chat_prompt(tokenizer, *c) for c in chats], 1.0, seed, tokens)

    letters = [some_letters(rng) for _ in range(count)]
    failed = [some_failure(rng) for _ in range(count)]
    shown = [reply_of(UNEDITED, program(each)) for each in letters]
    known = [{reply_of(e, edited(each, e)[1]): e for e in unread()} for each in letters]
    read = ask(0, [(EDIT, f"{f}\n{s}") for f, s in zip(failed, shown, strict=True)])
    blind = ask(1, [(EDIT, f"none\n{s}") for s in shown])
    first = [(INVENT, asked(ANOTHER, program(each))) for each in letters]
    invented = ask(2, first)
    inventions = [{invention(e, edited(each, e)[1]): e for e in unread()} for each in letters]
    repeated = ask(5, [(*own, said, NEW) for own, said in zip(first, invented, strict=True)])
    again = ask(3, [(INVENT, asked(MEND, edited(each, BROKEN)[1])) for each in letters])
    pairs = [[f.fix, BROKEN] if rng.random() < 0.5 else [BROKEN, f.fix] for f in failed]
    debates = [
        "\n".join([str(f), *(reply_of(e, edited(each, e)[1]) for e in pair)])
        for f, pair, each in zip(failed, pairs, letters, strict=True)
    ]
    sides = ["affirmative" if pair[1] == BROKEN else "negative" for pair in pairs]
    named = ask(4, [(COMPARE, debate) for debate in debates], 14)
    count_of = Counter[str]()
    for at in range(count):
        count_of["edits in grammar"] += read[at] in known[at]
        count_of["mend"] += known[at].get(read[at]) == failed[at].fix
        count_of["mend by chance"] += known[at].get(blind[at]) == failed[at].fix
        count_of["inventions in grammar"] += invented[at] in inventions[at]
        edit = inventions[at].get(invented[at], BROKEN)
        count_of["known letters"] += edit[0].upper() == edit[2]
        count_of["repeated"] += repeated[at] == invented[at].replace("wizard", "custom")
        count_of["mended calls"] += again[at] == invention(BROKEN, program(letters[at]))
        count_of["moderator"] += named[at] == sides[at]
    return {name: number / count for name, number in count_of.items()}


# what its weights follow from
TRAINING = (lesson, drawn, in_pieces, some_letters, some_failure, train, shares_loss)
WORLD = (program, edited, digit, Failure, unread, edits, verdicts, reply_of, invention, asked)
NETWORK = (tiny_network, tiny_tokenizer, chat_prompt, spread)
SHARES = (MENDS, KNOWS, JUDGES, BREAKS)
WORDS = (BROKEN, UNEDITED, EDIT, COMPARE, DECIDE, INVENT, ANOTHER, NEW, SURE, MEND, COPY)
MODEL = ToyModel(
    "tiny-edits",
    lambda say: train(EditsConfig(), say),
    save,
    (*LESSONS, *TRAINING, *WORLD, *NETWORK),
    (EditsConfig(), dict(KINDS), SHARES, WORDS, VOCAB, SPECIALS, TEMPLATE),
)


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM

    path = tiny_edits_model(say=lambda line: print(line, flush=True))
    print(path, shares(AutoModelForCausalLM.from_pretrained(path)))
