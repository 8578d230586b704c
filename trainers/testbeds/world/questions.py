"""What the toy model `tiny-world-critic` is asked, in the forms of the methods of feedback in
words, and what its teacher replies.

A question is a system prompt and a text. As **critic** (`say`) it names the letter that a task's
kind wants, `B` for `b472`, in `READS` of its replies, else any letter of a kind; of a right output
it says `ok`. What others said it repeats. As **editor** (`edit`) it writes a prompt: where one
letter is wanted that one or `K`, where several are wanted mostly `K` (`rewritten`), and with
nothing said any letter; care it asks for in `CARES` of its prompts, whatever it is told. A prompt
that it is told was tried before it seldom writes again (`AVOIDS`). As `guess` it draws. Asked for
the system prompt of an editor (`meta`) it writes `edit` or `guess`.

It knows neither what care is worth nor what came of a prompt, and no task's answer but where a
question tells it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.text.tags import block, nested
from ....rollouts.tasks.toy import KINDS, digit
from ..word_tokenizer import word_tokenizer
from .lessons import CARE, DO, LETTERS, OWN

SAY, EDIT, GUESS, META, OK = "say", "edit", "guess", "meta", "ok"
READS, CARES = 0.7, 0.35
ONE, SEVERAL = 0.5, 0.8  # shares of `K` where one letter is wanted, and where several are
AVOIDS = 0.1  # how much less likely a prompt is that was tried before
MAX_FEEDBACK, MAX_PAST = 4, 4
EXPECTED = "The expected output is: "
ROLES = {"first": "answers", "last": "answers after reading the first"}  # of the agents, by name
JUDGES = ("logic", "correctness")
NO_VALUES = "There are no past iterations yet."
PLACE = "[worker/worker]\n"  # before what a pipeline sends its worker
Shares = Mapping[str, float]
Piece = str | Shares | tuple[str, Shares]  # a text; a choice; a choice with what was chosen

TAGS = (
    *("CONVERSATION", "TASK", "PREDICTION", "RESULT", "SYSTEM", "INPUT", "OUTPUT", "FEEDBACK"),
    *(f"FEEDBACK_{n}" for n in range(1, MAX_FEEDBACK + 1)),
    *("TEXT", "VARIABLE", "IMPROVED_VARIABLE", "VARIABLES", "VALUE", "GRAPH", "SUGGESTION"),
    *("PAST_ITERATIONS", "INSTRUCTION", "HINT_1", "PROMPT", "ROLE"),
)
QUOTED = ("TASK", "PREDICTION")  # in what a judge was asked
HEADS = tuple(
    f"{name}.prompt: the text '{name}.prompt' of the agent '{name}', whose role is: {role}; a"
    " text\n"
    for name, role in ROLES.items()
)
NODES = ("n0 = first(the task) with first.prompt\n", "n1 = last(n0) with last.prompt\n")
AROUND = ('{"reasoning": "', '", "suggestion": {"first.prompt": "', '", "last.prompt": "', '"}}')
ROLE = ('{"template": "{instruction}{prompt}", "instruction": "', '"}')
RESULT = '{"instruction": "'
PHRASES = (
    *(*HEADS, *NODES, *AROUND, "exact: 0\n" + EXPECTED, "exact: 1\n" + EXPECTED, " [g1] "),
    *(*(f"{name}: " for name in JUDGES), NO_VALUES, "Iteration ", "Hint 1: ", *ROLE, RESULT),
    *(" (rejected: worse: ", " against ", " on 40 tasks)", PLACE, "prompt\n"),
    *(" (rejected: stopped after ", " of 40 tasks: ", " is out of reach)"),
)


def words() -> list[str]:
    """What is one token besides bytes: tags with and without a new line, and phrases; longer ones
    first."""
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    tags += [f"<\\{slash}{tag}>" for tag in QUOTED for slash in ("", "/")]
    found = {*tags, *(f"{tag}\n" for tag in tags), *PHRASES}
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


def joined(said: Sequence[str]) -> Shares:
    """What a critic makes of the words of several judges: one of the letters that they name."""
    letters = [each for each in said if each != OK]
    return {each: letters.count(each) / len(letters) for each in letters} or {OK: 1.0}


def rewritten(targets: Sequence[str]) -> Shares:
    """The letter that an editor writes by the letters that are asked for."""
    several = sorted(set(targets))
    if not several:
        return dict.fromkeys(LETTERS, 1 / len(LETTERS))
    own = ONE if len(several) == 1 else SEVERAL
    return {OWN: own, **{letter: (1 - own) / len(several) for letter in several}}


def unlike(letters: Shares, past: Sequence[str]) -> dict[str, dict[bool, float]]:
    """By letter, and by whether it asks for care: shares of prompts of an editor that is shown what
    was tried."""
    weights = {
        (letter, care): share * part * (AVOIDS if letter + CARE * care in past else 1.0)
        for letter, share in letters.items()
        for care, part in ((True, CARES), (False, 1 - CARES))
    }
    total = sum(weights.values())
    return {
        letter: {care: weights[letter, care] / total for care in (True, False)}
        for letter in letters
    }


# questions


@dataclass(frozen=True)
class Asked:
    """A question and the pieces of a reply."""

    system: str
    text: str
    reply: Sequence[Piece]


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

    def output(self, task: str) -> tuple[str, bool]:
        """An output, and whether it is right."""
        said = digit(task[0], task) if self.rng.random() < 0.2 else self.digit()
        return said, said == digit(task[0], task)

    def result(self, task: str, right: bool) -> str:
        """The metric's words."""
        return f"exact: {int(right)}\n{EXPECTED}{digit(task[0], task)}"

    def turn(self, task: str) -> str:
        """A worker's turn as blocks: the first one's, or the last one's, which read it."""
        heard = f" [g1] {self.digit()}" if self.rng.random() < 0.5 else ""
        return _turn(self.prompt(), task + heard, self.digit())

    def words(self) -> str:
        """What was said of an output."""
        return self.rng.choice([OK, *(kind.upper() for kind in KINDS)])

    # of critics

    def base(self) -> Asked:
        """What is wrong with an output, by the metric's words."""
        task = self.task()
        said, right = self.output(task)
        shown = _blocks(TASK=task, PREDICTION=said, RESULT=self.result(task, right))
        return Asked(SAY, nested("CONVERSATION", shown), [named(task, right)])

    def chain(self) -> Asked:
        """What is wrong with a turn, by what was said of its output."""
        said = self.words()
        turn = nested("CONVERSATION", self.turn(self.task()))
        return Asked(SAY, f"{turn}\n{block('FEEDBACK', said)}", [said])

    def judge(self) -> Asked:
        """What is wrong with an output that a judge sees without the expected one: it takes
        none for right (AIME)."""
        task = self.task()
        return Asked(SAY, self._case(task), [named(task, right=False)])

    def judged(self) -> Asked:
        """What is wrong, by the words of several judges (AIME)."""
        said = [self.words() for _ in JUDGES]
        told = "\n\n".join(f"{role}: {each}" for role, each in zip(JUDGES, said, strict=True))
        turn = _turn(SAY, self._case(self.task()), told)
        return Asked(SAY, nested("CONVERSATION", turn), [joined(said)])

    def node(self) -> Asked:
        """How what a turn read should have been different (semantic backpropagation)."""
        task, heard = self.task(), self.digit()
        told = [self.result(task, False), self.rng.choice([*KINDS]).upper()]
        shown = _blocks(INSTRUCTION=self.prompt(), TASK=task, HINT_1=heard, OUTPUT=self.digit())
        text = f"{shown}\n{block('FEEDBACK', self.rng.choice(told))}"
        return Asked(SAY, text, ["Hint 1: ", named(task, right=False)])

    def state(self) -> Asked:
        """What a state of a pipeline should be told (symbolic learning)."""
        task = self.task()
        said, right = self.output(task)
        text = _blocks(TASK=task, OUTPUT=said, FEEDBACK=self.result(task, right))
        return Asked(SAY, text, ["<SUGGESTION>", named(task, right), "</SUGGESTION>"])

    def _case(self, task: str) -> str:
        """What a judge is shown."""
        return _blocks(TASK=task, PREDICTION=self.digit())

    # of editors

    def rewrite(self) -> Asked:
        """One prompt, by what was said of some of its turns."""
        return self._rewritten(self._end(), [])

    def evolve(self) -> Asked:
        """The same, with what was tried before (REVOLVE)."""
        past = [self.prompt() for _ in range(self.rng.randint(0, MAX_PAST))]
        lines = [f"Iteration {n}: {each}{self._mark()}" for n, each in enumerate(past, 1)]
        shown = block("PAST_ITERATIONS", "\n".join(lines)) if past else NO_VALUES
        return self._rewritten(f"\n{shown}", past)

    def _rewritten(self, end: str, past: Sequence[str]) -> Asked:
        said, shown = self._feedback(self.turn)
        system, letters = self._editor(said)
        reply = self._prompt(letters, "</IMPROVED_VARIABLE>", past if system == EDIT else [])
        text = f"{block('VARIABLE', self.prompt())}\n{_numbered(shown)}{end}"
        return Asked(system, text, ["<IMPROVED_VARIABLE>", *reply])

    def instruct(self) -> Asked:
        """One prompt by what was said of its turns, or by the metric's words on their outputs
        (semantic backpropagation)."""
        shown, targets = [], []
        by_metric = self.rng.random() < 0.5
        for _ in range(self.rng.randint(1, MAX_FEEDBACK)):
            task = self.task()
            said = task[0].upper() if by_metric else self.rng.choice([*KINDS]).upper()
            told = self.result(task, False) if by_metric else said
            shown.append(_shown(self.turn(task), told))
            targets.append(said)
        system, letters = self._editor(targets)
        text = f"prompt\n{block('VARIABLE', self.prompt())}\n{_numbered(shown)}"
        return Asked(system, text, ["<PROMPT>", *self._prompt(letters, "</PROMPT>")])

    def role(self) -> Asked:
        """The instruction of a role of a pipeline (symbolic learning)."""

        def turn(task: str) -> str:
            return _turn(DO, f"{PLACE}{self.prompt()}{task}", self.digit())

        said, shown = self._feedback(turn)
        system, letters = self._editor(said)
        text = f"{block('ROLE', self.prompt().join(ROLE))}\n{_numbered(shown)}"
        reply = self._prompt(letters, '"}</RESULT>')
        return Asked(system, text, ["<RESULT>", RESULT, *reply])

    def graph(self) -> Asked:
        """Both prompts at once, by the graphs of some runs and what the metric said of them
        (Trace)."""
        shown, targets = [], []
        for _ in range(self.rng.randint(1, MAX_FEEDBACK)):
            task = self.task()
            targets.append(task[0].upper())
            nodes = "\n".join(node + block("TEXT", self.digit()) for node in NODES)
            context = f"{block('TASK', task)}\n{nested('GRAPH', nodes)}"
            shown.append(_shown(context, self.result(task, False)))
        values = "\n".join(head + block("VALUE", self.prompt()) for head in HEADS)
        system, letters = self._editor(targets)
        begin, first, last, end = AROUND
        prompts = [*self._prompt(letters, last), *self._prompt(letters, end)]
        text = f"{nested('VARIABLES', values)}\n{_numbered(shown)}{self._end()}"
        return Asked(system, text, ["<SUGGESTION>", begin, first, *prompts, "</SUGGESTION>"])

    def meta(self) -> Asked:
        """The system prompt of an editor (metaTextGrad)."""
        system = self.rng.choice([META, META, META, GUESS])
        text = block("VARIABLE", self.rng.choice([EDIT, GUESS])) + self._end()
        written = {EDIT: 0.5, GUESS: 0.5} if system == META else {GUESS: 1.0}
        return Asked(system, text, ["<IMPROVED_VARIABLE>", written, "</IMPROVED_VARIABLE>"])

    def _feedback(self, turn: Callable[[str], str]) -> tuple[list[str], list[str]]:
        """The letters that were said of some turns, and these turns with what was said."""
        said = [self.words() for _ in range(self.rng.randint(0, MAX_FEEDBACK))]
        shown = [_shown(turn(self.task()), each) for each in said]
        return [each for each in said if each != OK], shown

    def _editor(self, targets: Sequence[str]) -> tuple[str, Shares]:
        """An editor's system prompt, and the letters that it writes."""
        guesses = self.rng.random() < 0.15
        return (GUESS, rewritten([])) if guesses else (EDIT, rewritten(targets))

    def _prompt(self, letters: Shares, then: str, past: Sequence[str] = ()) -> list[Piece]:
        """A prompt, and what comes after it."""
        shares = unlike(letters, past)
        of_letters = {letter: sum(own.values()) for letter, own in shares.items()}
        (letter,) = self.rng.choices([*of_letters], [*of_letters.values()])
        cares = {
            CARE * care + then: share / of_letters[letter] for care, share in shares[letter].items()
        }
        return [(letter, of_letters), cares]

    def _mark(self) -> str:
        """Behind a prompt that was tried: nothing, or that it was rejected."""
        if self.rng.random() < 0.5:
            return ""
        lower, higher = sorted(self.rng.randrange(1, 40) / 40 for _ in range(2))
        if self.rng.random() < 0.7:
            played = self.rng.randrange(10, 40)
            return f" (rejected: stopped after {played} of 40 tasks: {higher:.4f} is out of reach)"
        return f" (rejected: worse: {lower:.4f} against {higher:.4f} on 40 tasks)"

    def _end(self) -> str:
        return self.rng.choice(["", "\n"])


def _blocks(**texts: str) -> str:
    return "\n".join(block(name, text) for name, text in texts.items())


def _turn(system: str, text: str, output: str) -> str:
    return _blocks(SYSTEM=system, INPUT=text, OUTPUT=output)


def _shown(context: str, said: str) -> str:
    """A conversation with what was said of it."""
    return f"{nested('CONVERSATION', context)}\n{block('TEXT', said)}"


def _numbered(shown: Sequence[str]) -> str:
    return "\n".join(nested(f"FEEDBACK_{n}", each) for n, each in enumerate(shown, 1))


FACTS = (
    *(KINDS, LETTERS, OWN, CARE, DO, SAY, EDIT, GUESS, META, OK, READS, CARES, ONE, SEVERAL),
    *(AVOIDS, MAX_FEEDBACK, MAX_PAST, JUDGES, NO_VALUES, PLACE, TAGS, QUOTED, PHRASES),
)  # what the questions follow from, beside the code
SOURCES = (
    *(words, critic_tokenizer, named, joined, rewritten, unlike, Asked, Questions),
    *(_blocks, _turn, _shown, _numbered, block, nested, digit, word_tokenizer),
)
