"""What the toy model `tiny-critic` reads: its tokenizer, and chats as they occur in the runs of the
methods of feedback in words, drawn without end."""

from __future__ import annotations

import random
import re
from typing import Any

from ....agents.text.tags import block, nested
from ....rollouts.engines.scripted import SPECIALS, TEMPLATE
from ...feedback.backward import Feedback
from ...feedback.rewriters import feedback_blocks
from .teacher import (
    AMOUNTS,
    CARELESS,
    EXPECTED,
    GUESS,
    JUDGE,
    KIND,
    META,
    OK,
    ROLES,
    SAY,
    VALUES,
    replies,
)

TAGS = (
    "CONVERSATION", "TASK", "PREDICTION", "RESULT", "EXPECTED", "SYSTEM", "INPUT", "OUTPUT",
    "FEEDBACK", "FEEDBACK_1", "FEEDBACK_2", "FEEDBACK_3", "FEEDBACK_4", "TEXT", "ABOUT",
    "VARIABLE", "IMPROVED_VARIABLE", "PAST_ITERATIONS", "VARIABLES", "VALUE", "GRAPH",
    "SUGGESTION", "PREVIOUS", "ROLE", "PROMPT",
)  # fmt: skip
PHRASES = (
    "exact: ",
    f"\n{EXPECTED}",
    EXPECTED,
    '{"reasoning": "',
    '", "suggestion": {"worker.prompt": "',
    '"}}',
    '{"instruction": "',
    '"}',
    '{"template": "{instruction}{prompt}", "instruction": "',
    "n0 = worker(the task) with worker.prompt\n",
    "worker.prompt: the text 'worker.prompt' of the agent 'worker'; a text\n",
    "There are no past iterations yet.",
    "Iteration ",
    " (rejected: ",
    "task ",
    ", call 0, score 0",
    "[worker/worker]\n",
    *(f"{role}: " for role in ROLES),
    *(f"{role}\n" for role in ROLES),
    "stopped after ",
    " is out of reach)",
    " of 30 tasks",
    " against 0.",
    "worse: 0.",
    *(name for name in (*CARELESS, GUESS, SAY, JUDGE, META, OK, "prompt\n")),
)
NAME = "worker"  # of the agent
# words that hold a digit, one token for each digit; values come first
NUMBERED = (
    VALUES,
    AMOUNTS,
    [f"{EXPECTED}{digit}" for digit in range(10)],
    [f"\n{EXPECTED}{digit}" for digit in range(10)],
    [f"<EXPECTED>\n{digit}" for digit in range(10)],
)
ZERO = 0.4  # share of zeros besides those that are drawn


def critic_tokenizer() -> Any:
    """Bytes, tags and phrases, and five special tokens, as a fast tokenizer built in memory, with
    the template of the other toy models."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = whole_words()
    # a value, but not the beginning of a problem; longer words first
    pattern = "|".join([*map(re.escape, words), rf"{KIND}\d(?!\d)"])
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [level.pre_tokenize_str(word)[0][0] for word in words]
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *spelled, *VALUES]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def whole_words() -> list[str]:
    """What is one token besides values: tags, with and without a new line, phrases, and words that
    hold a digit; longer ones first."""
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    quoted = ("TASK", "PREDICTION", "EXPECTED")  # by a judge's conversation
    escaped = [f"<\\{slash}{tag}>" for tag in quoted for slash in ("", "/")]
    numbered = [word for words in NUMBERED[1:] for word in words]
    words = [*tags, *escaped, *(f"{tag}\n" for tag in (*tags, *escaped)), *PHRASES, *numbered]
    return sorted(dict.fromkeys(words), key=lambda word: (-len(word), word))


# what it is asked


Asked = tuple[str, str]  # system message and message


class Questions:
    """Chats as they occur in the methods' runs, drawn without end."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.piped = 0.3

    def value(self) -> str:
        return KIND + self.often_zero()

    def problem(self) -> str:
        return f"{KIND}{self.rng.randrange(100):02}{self.often_zero()}"

    def digit(self) -> str:
        return str(self.rng.randrange(10))

    def often_zero(self) -> str:
        """A digit that is added: of a sum modulo ten neither part alone says anything, unless the
        other one is 0; so that is where learning begins."""
        return "0" if self.rng.random() < ZERO else self.digit()

    def words(self) -> str:
        """The metric's words on an output."""
        chance = self.rng.random()
        if chance < 0.15:
            return f"exact: 1\n{EXPECTED}{self.digit()}"
        return "exact: 0" if chance < 0.2 else f"exact: 0\n{EXPECTED}{self.digit()}"

    def amount(self) -> str:
        """What a critic says."""
        return OK if self.rng.random() < 0.15 else self.rng.choice(AMOUNTS)

    def worked(self) -> Asked:
        if self.rng.random() < self.piped:  # in a pipeline
            return "", f"[{NAME}/{NAME}]\n{self.value()}{self.problem()}"
        return self.value(), self.problem()

    def judged(self) -> Asked:
        role, expected = self.rng.choice([ROLES[0], *ROLES]), self.digit()
        said = expected if self.rng.random() < 0.2 else self.digit()
        blocks = [block("TASK", self.problem()), block("PREDICTION", said)]
        return JUDGE, "\n".join([role, *blocks, block("EXPECTED", expected)])

    def said(self) -> Asked:
        kind = self.rng.choice(
            ("base", "base", "base", "base", "chain", "judged", "state", "state")
        )
        task, output = block("TASK", self.problem()), self.digit()
        if kind == "base":
            blocks = [task, block("PREDICTION", output), block("RESULT", self.words())]
            return SAY, nested("CONVERSATION", "\n".join(blocks))
        if kind == "judged":
            system, text = self.judged()
            names = f"{ROLES[0]}: {self.amount()}\n\n{ROLES[1]}: {OK}"
            blocks = [block("SYSTEM", system), block("INPUT", text), block("OUTPUT", names)]
            return SAY, nested("CONVERSATION", "\n".join(blocks))
        if kind == "chain":
            turn = nested("CONVERSATION", "\n".join(self.turn(self.value())))
            return SAY, f"{turn}\n{block('FEEDBACK', self.amount())}"
        return SAY, "\n".join([task, block("OUTPUT", output), block("FEEDBACK", self.words())])

    def turn(self, value: str, piped: bool = False) -> list[str]:
        """A worker's turn as blocks."""
        text = f"[{NAME}/{NAME}]\n{value}{self.problem()}" if piped else self.problem()
        system = [] if piped else [block("SYSTEM", value)]
        return [*system, block("INPUT", text), block("OUTPUT", self.digit())]

    def edited(self, count: int | None = None) -> Asked:
        """`count`: of the feedback; None: none or one."""
        form = self.rng.choice(("gradient", "gradient", "direct", "graph", "pipeline"))
        system = self.rng.choice([*CARELESS, "edit", "edit"]) if form == "gradient" else "edit"
        if self.rng.random() < 0.1:
            system = GUESS
        value = self.value()
        told = (self.rng.random() < 0.85) if count is None else count
        shown = feedback_blocks(
            [self.feedback(form, value) for _ in range(told)],
            form == "gradient" and self.rng.random() < 0.2,
        )
        if form == "pipeline":
            role = f'{{"template": "{{instruction}}{{prompt}}", "instruction": "{value}"}}'
            return system, f"{block('ROLE', role)}\n{shown}"
        if form == "graph":
            named = f"{NAME}.prompt: the text '{NAME}.prompt' of the agent '{NAME}'; a text"
            variables = nested("VARIABLES", f"{named}\n{block('VALUE', value)}")
            return system, f"{variables}\n{shown}"
        if form == "direct":
            return system, f"prompt\n{block('VARIABLE', value)}\n{shown}"
        return system, f"{block('VARIABLE', value)}\n{shown}{self.history()}"

    def edited_by_two(self) -> Asked:
        return self.edited(2)

    def feedback(self, form: str, value: str) -> Feedback:
        told = {"gradient": self.amount, "pipeline": self.amount}.get(form, self.words)()
        if form == "graph":
            told = told if "exact: 0" in told else f"exact: 0\n{EXPECTED}{self.digit()}"
            head = f"n0 = {NAME}(the task) with {NAME}.prompt\n"
            graph = nested("GRAPH", head + block("TEXT", self.digit()))
            context = f"{block('TASK', self.problem())}\n{graph}"
            return Feedback(told, "", "", 0.0, context)
        context = "\n".join(self.turn(value, piped=form == "pipeline"))
        return Feedback(told, self.problem(), "", 0.0, context, order=0)

    def history(self) -> str:
        chance = self.rng.random()
        if chance < 0.9:
            return "\n" * (chance < 0.7)
        if chance < 0.93:
            return "\nThere are no past iterations yet."
        lines = []
        for number in range(1, self.rng.randint(1, 2) + 1):
            tried = f"0.{self.rng.randrange(10000):04}"
            why = self.rng.choice(
                (
                    f"worse: {tried} against {tried} on 30 tasks",
                    f"stopped after 4 of 30 tasks: {tried} is out of reach",
                )
            )
            rejected = f" (rejected: {why})" if self.rng.random() < 0.5 else ""
            lines.append(f"Iteration {number}: {self.value()}{rejected}")
        return "\n" + block("PAST_ITERATIONS", "\n".join(lines))


def drawn(asked: Asked, rng: random.Random) -> tuple[str, float]:
    """A reply of the teacher to a question, and its share."""
    shares = replies(*asked)
    (reply,) = rng.choices([*shares], [*shares.values()])
    return reply, shares[reply]
