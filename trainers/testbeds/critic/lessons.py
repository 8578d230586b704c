"""What the toy model `tiny-critic` reads: its tokenizer, and chats as they occur in the runs of the
methods of feedback in words, drawn without end."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ....agents.text.tags import block, nested
from ...feedback.backward import Feedback
from ...feedback.rewriters import feedback_blocks
from ..tiny import chat_prompt
from ..word_tokenizer import word_tokenizer
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
PROBLEMS = [f"{KIND}{number:03}" for number in range(1000)]  # a token each
ZERO = 0.4  # share of zeros besides those that are drawn


def critic_tokenizer() -> Any:
    """Bytes, tags and phrases, values, problems, and five special tokens."""
    # longer words first; a value is not the beginning of a problem
    split_off = (rf"{KIND}\d{{3}}", rf"{KIND}\d(?!\d)")
    return word_tokenizer(whole_words(), split_off, [*VALUES, *PROBLEMS])


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
        """What a critic says, or repeats."""
        chance = self.rng.random()
        if chance < 0.15:
            return OK
        head = f"{self.digit()}>{self.digit()}" if chance < 0.5 else ""
        return head + self.rng.choice(AMOUNTS)

    def worked(self) -> Asked:
        if self.rng.random() < self.piped:  # in a pipeline
            return "", f"[{NAME}/{NAME}]\n{self.value()}{self.problem()}"
        return self.value(), self.problem()

    def judged(self) -> Asked:
        role, expected = self.rng.choice([ROLES[0], *ROLES]), self.digit()
        said = expected if self.rng.random() < 0.2 else self.digit()
        blocks = [block("TASK", self.problem()), block("PREDICTION", said)]
        return JUDGE, "\n".join([role, *blocks, block("EXPECTED", expected)])

    def criticised(self) -> Asked:
        """A critic, told what the metric says of an output."""
        return criticism(self.problem(), self.words(), self.digit())

    def required(self) -> Asked:
        """A critic of a pipeline's state, told the same."""
        blocks = [block("TASK", self.problem()), block("OUTPUT", self.digit())]
        return SAY, "\n".join([*blocks, block("FEEDBACK", self.words())])

    def repeated(self) -> Asked:
        """A critic, told what was said of an output: by judges, or of a worker's turn."""
        if self.rng.random() < 0.4:
            system, text = self.judged()
            names = f"{ROLES[0]}: {self.amount()}\n\n{ROLES[1]}: {OK}"
            blocks = [block("SYSTEM", system), block("INPUT", text), block("OUTPUT", names)]
            return SAY, nested("CONVERSATION", "\n".join(blocks))
        turn = nested("CONVERSATION", "\n".join(self.turn(self.value())))
        return SAY, f"{turn}\n{block('FEEDBACK', self.amount())}"

    def turn(self, value: str, piped: bool = False) -> list[str]:
        """A worker's turn as blocks."""
        text = f"[{NAME}/{NAME}]\n{value}{self.problem()}" if piped else self.problem()
        system = [] if piped else [block("SYSTEM", value)]
        return [*system, block("INPUT", text), block("OUTPUT", self.digit())]

    def edited(self, count: int | None = None) -> Asked:
        """An editor, told amounts. `count`: of the feedback; None: none or one."""
        system, value = self.editor(CARELESS), self.value()
        if self.rng.random() < 0.4:
            role = f'{{"template": "{{instruction}}{{prompt}}", "instruction": "{value}"}}'
            return system, f"{block('ROLE', role)}\n{self.shown('pipeline', value, count)}"
        shown = self.shown("gradient", value, count)
        return system, f"{block('VARIABLE', value)}\n{shown}{self.history()}"

    def reasoned(self, count: int | None = None) -> Asked:
        """An editor, told the metric's words, which names amounts before it puts one in."""
        system, value = self.editor(["edit"]), self.value()
        if self.rng.random() < 0.5:
            return system, f"prompt\n{block('VARIABLE', value)}\n{self.shown('', value, count)}"
        named = f"{NAME}.prompt: the text '{NAME}.prompt' of the agent '{NAME}'; a text"
        variables = nested("VARIABLES", f"{named}\n{block('VALUE', value)}")
        return system, f"{variables}\n{self.shown('graph', value, count)}"

    def edited_by_two(self) -> Asked:
        return self.edited(2)

    def reasoned_by_two(self) -> Asked:
        return self.reasoned(2)

    def editor(self, prompts: Iterable[str]) -> str:
        return GUESS if self.rng.random() < 0.1 else self.rng.choice([*prompts])

    def shown(self, form: str, value: str, count: int | None) -> str:
        """Feedback as an editor is shown it."""
        told = (self.rng.random() < 0.85) if count is None else count
        turns = form == "gradient" and self.rng.random() < 0.2
        return feedback_blocks([self.feedback(form, value) for _ in range(told)], turns)

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


def criticism(problem: str, words: str, output: str = "0") -> Asked:
    """What a critic is asked of an output, by the metric's words on it."""
    blocks = [block("TASK", problem), block("PREDICTION", output), block("RESULT", words)]
    return SAY, nested("CONVERSATION", "\n".join(blocks))


def rewriting(value: str, problem: str, critique: str) -> Asked:
    """What an editor is asked of a value, by what was said of it; "": nothing was."""
    turn = [block("SYSTEM", value), block("INPUT", problem), block("OUTPUT", "0")]
    told = [Feedback(critique, problem, "", 0.0, "\n".join(turn))] if critique else []
    return "edit", f"{block('VARIABLE', value)}\n{feedback_blocks(told)}\n"


@dataclass(frozen=True)
class Lesson:
    """A chat's prompt, a reply drawn from the teacher's, and the shares of the tokens that the
    teacher may have at each place of the reply."""

    prompt: list[int]
    reply: list[int]
    targets: list[dict[int, float]]


class Lessons:
    """Questions and replies as tokens."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tokenizer = rng, critic_tokenizer()
        self.known: dict[str, tuple[int, ...]] = {}

    def of(self, asked: Asked) -> Lesson:
        shares = {self.reply(text): share for text, share in replies(*asked).items()}
        (drawn,) = self.rng.choices([*shares], [*shares.values()])
        targets = [_next_tokens(shares, drawn[:n]) for n in range(len(drawn))]
        return Lesson(self.prompt(asked), [*drawn], targets)

    def prompt(self, asked: Asked) -> list[int]:
        """Token ids of a chat's prompt; without a system message where that is empty."""
        texts = (text for text in asked if text)
        return chat_prompt(self.tokenizer, *texts, system=bool(asked[0]))

    def reply(self, text: str) -> tuple[int, ...]:
        """Token ids of a reply with its end."""
        if text not in self.known:
            self.known[text] = tuple(self.tokenizer.encode(text + "<|end|>"))
        return self.known[text]


def _next_tokens(
    shares: Mapping[tuple[int, ...], float], beginning: tuple[int, ...]
) -> dict[int, float]:
    """Shares of the tokens that come next in the replies that begin so."""
    found: dict[int, float] = {}
    for ids, share in shares.items():
        if ids[: len(beginning)] == beginning:
            found[ids[len(beginning)]] = found.get(ids[len(beginning)], 0.0) + share
    total = sum(found.values())
    return {token: share / total for token, share in found.items()}
