"""What the toy model `tiny-world` is taught: the shares of its teacher's replies in every role, and
prompts as they occur in play.

Problems are those of `program_tasks`: `a472` asks for the last digit plus 1, `b472` plus 4, `c472`
plus 7 (mod 10).

**Worker.** It goes by an instruction, a letter and `!` for care: `A`, `B` and `C` ask for a kind,
whatever the problem says, `K` for the kind that the problem says. That is its system prompt, or
stands before the problem under the system prompt `do`. Or the instruction is what to add for each
kind, `a1b4c7` where it is right; this is learnt only in part. In spite of a wrong instruction it
strays to what is right in `STRAYS` of its answers, or more after worked examples that are right
(`own_share`). It slips to one too many where the last digit is 5 or more, more often than not
(`slip_share`); care helps up to 7, and not with 8 and 9. Shown what others answered, it says in
`FOLLOW` of its answers what most of them say, right or wrong.

**Designers.** Of programs (`design`) and of workflows of steps (`steps`): they ask a worker for
something, mostly for the wrong thing, and some of what they write cannot be run.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....rollouts.tasks.toy import KINDS, digit
from ..tiny import chat_prompt, tiny_tokenizer

OWN, CARE = "K", "!"  # the instruction that is right for all problems; what asks for care
LETTERS = [*(kind.upper() for kind in KINDS), OWN]
DO, DESIGN, STEPS = "do", "design", "steps"  # system prompts
AMOUNTS = re.compile(r"a(\d)b(\d)c(\d)")  # other system prompts of a worker
STRAYS = 0.3  # share of answers by the problem's own kind in spite of the instruction
TRUST = (
    8.0  # how much likelier a right example makes the problem's own kind, a wrong one unlikelier
)
SLIP, CAREFUL = 0.6, 0.25  # shares of slips where one is possible, without and with care
FOLLOW = 0.65  # share of answers that are what most of the others say
MAX_EXAMPLES, MAX_OTHERS = 4, 5
NAMES = tuple(f"g{n}" for n in range(1, 8))

Answers = Mapping[str, float]  # replies and their shares


# worker


def asked_answer(instruction: str, problem: str) -> str:
    """The answer that an instruction asks for."""
    if amounts := AMOUNTS.fullmatch(instruction):
        return str((int(problem[3]) + int(amounts["abc".index(problem[0]) + 1])) % 10)
    return digit(problem[0] if instruction[0] == OWN else instruction[0].lower(), problem)


def own_share(examples: Sequence[tuple[str, str]] = ()) -> float:
    """Share of answers that are meant right, whatever the instruction is.

    examples: (problem, answer) in the chat. Each that is right multiplies the odds
    by TRUST, each other one divides them.
    """
    right = sum(said == digit(problem[0], problem) for problem, said in examples)
    odds = STRAYS / (1 - STRAYS) * TRUST ** (2 * right - len(examples))
    return odds / (1 + odds)


def slip_share(instruction: str, problem: str) -> float:
    """Share of answers that are one too many."""
    last = int(problem[3])
    if last < 5:
        return 0.0
    return CAREFUL if instruction.endswith(CARE) and last < 8 else SLIP


def work(
    instruction: str,
    problem: str,
    others: Sequence[str] = (),
    examples: Sequence[tuple[str, str]] = (),
    expert: str = "",
) -> Answers:
    """A worker's answer. `others`: answers it was shown. `expert`: a kind of problem on which it
    goes by nothing else and does not slip, "" for none."""
    if expert and problem[0] == expert:
        return {digit(expert, problem): 1.0}
    shares: dict[str, float] = dict.fromkeys(map(str, range(10)), 0.0)
    own, slip = own_share(examples), slip_share(instruction, problem)
    meant = ((digit(problem[0], problem), own), (asked_answer(instruction, problem), 1 - own))
    for answer, share in meant:
        shares[answer] += share * (1 - slip)
        shares[str((int(answer) + 1) % 10)] += share * slip
    if others:
        counts = Counter(others)
        most = [said for said, count in counts.items() if count == max(counts.values())]
        shares = {
            said: (1 - FOLLOW) * share + FOLLOW * (said in most) / len(most)
            for said, share in shares.items()
        }
    return {said: share for said, share in shares.items() if share > 0}


# designers

# shares of what a designer asks for: the kind of the problem, the next one, the third, and `K`
ASKED, NEXT, THIRD, FOR_OWN = 0.3, 0.4, 0.15, 0.15
CARES = 0.35  # share of instructions that ask for care
INVALID = 0.1  # share of programs and workflows that cannot be run
PROGRAM, BROKEN = 'await custom("K")', 'await magic("K")'  # K is the instruction
FEEDBACK = ("0/2", "1/2", "2/2", "invalid")
# workflows and their shares; K is the instruction
WORKFLOWS: Mapping[str, float] = {
    "1:::process:::K:::next::2\n2:::terminal": 1 - INVALID,
    "1:::process:::K:::next::1": INVALID / 2,
    "1:::process:::K:::next::3\n2:::terminal": INVALID / 2,
}

FACTS = (
    *(OWN, CARE, DO, DESIGN, STEPS, AMOUNTS.pattern, STRAYS, TRUST, SLIP, CAREFUL, FOLLOW),
    *(MAX_EXAMPLES, MAX_OTHERS, NAMES, ASKED, NEXT, THIRD, FOR_OWN, CARES, INVALID),
    *(PROGRAM, BROKEN, FEEDBACK, dict(WORKFLOWS)),
)  # what the lessons follow from, beside the code


def instructions(kind: str) -> dict[str, float]:
    """What a designer asks for and how often, told a problem of this kind; `k` is no kind, and all
    kinds are asked for alike."""
    kinds = [*KINDS]
    if kind in kinds:
        place = kinds.index(kind)
        order = kinds[place:] + kinds[:place]
        asks = dict(zip(order, (ASKED, NEXT, THIRD), strict=True))
    else:
        asks = dict.fromkeys(kinds, (1 - FOR_OWN) / len(kinds))
    letters = {k.upper(): share for k, share in asks.items()} | {OWN: FOR_OWN}
    return {
        letter + care: share * part
        for letter, share in letters.items()
        for care, part in ((CARE, CARES), ("", 1 - CARES))
    }


def design(kind: str, history: Sequence[tuple[str, str]] = ()) -> Answers:
    """A program. `history`: of earlier rounds the program and the feedback on it; after two
    failures it asks for something else, after a success for the same again."""
    weight = {
        form.replace("K", asked): share * part
        for asked, share in instructions(kind).items()
        for form, part in ((PROGRAM, 1 - INVALID), (BROKEN, INVALID))
    }
    for program, feedback in history:
        for text in weight:
            if feedback == "invalid":
                weight[text] *= 0.1 if text.startswith(BROKEN[:9]) else 1.0
            elif _letter(text) == _letter(program) and not text.startswith(BROKEN[:9]):
                weight[text] *= {"0/2": 0.05, "1/2": 1.0, "2/2": 20.0}[feedback]
    total = sum(weight.values())
    return {text: share / total for text, share in weight.items()}


def _letter(program: str) -> str:
    return program.split('"')[1][0]


def workflow(description: str) -> Answers:
    """A workflow of one step."""
    return {
        form.replace("K", asked): share * part
        for asked, share in instructions(description).items()
        for form, part in WORKFLOWS.items()
    }


# lessons


@dataclass(frozen=True)
class Lesson:
    """A chat's prompt, a reply drawn from the teacher's, and the shares of the tokens that may
    stand at each of its places."""

    prompt: list[int]
    reply: list[int]
    targets: list[dict[int, float]]


class Lessons:
    """Prompts of every role, drawn without end.

    expert: of a worker, as of `work`. letters: share of a worker's system prompts that are a
    letter.
    """

    def __init__(self, rng: random.Random, expert: str = "", letters: float = 0.0) -> None:
        self.rng, self.expert, self.letters = rng, expert, letters
        self.tokenizer = tiny_tokenizer()

    def of(self, replies: Answers, *texts: str) -> Lesson:
        """A lesson; `texts`: the system prompt, then user and assistant in turn."""
        ended = {text + "\0": share for text, share in replies.items()}
        (drawn,) = self.rng.choices([*ended], [*ended.values()])
        targets = [self.shares(_next_signs(ended, drawn[:n])) for n in range(len(drawn))]
        reply = self.tokenizer.encode(drawn[:-1] + "<|end|>")
        return Lesson(chat_prompt(self.tokenizer, *texts), reply, targets)

    def shares(self, signs: Answers) -> dict[int, float]:
        """Shares of tokens; all texts here are of one byte per character."""
        return {
            self.tokenizer.encode("<|end|>" if sign == "\0" else sign)[0]: share
            for sign, share in signs.items()
        }

    def problem(self, kind: str = "") -> str:
        return f"{kind or self.rng.choice([*KINDS])}{self.rng.randrange(1000):03}"

    def letter(self) -> str:
        return self.rng.choice(LETTERS) + self.rng.choice(["", CARE])

    def amounts(self) -> str:
        """What to add for each kind; a part of it is right."""
        rng, share = self.rng, self.rng.random()
        drawn = (right if rng.random() < share else rng.randrange(10) for right in KINDS.values())
        return "".join(f"{kind}{amount}" for kind, amount in zip(KINDS, drawn, strict=True))

    def prompt(self) -> str:
        """A worker's system prompt."""
        if self.letters and self.rng.random() < self.letters:
            return self.letter()
        return self.amounts()

    def alone(self) -> Lesson:
        """A problem, by an instruction before it or in the system prompt."""
        problem, way = self.problem(), self.rng.random()
        said = self.letter if way < 0.4 else self.amounts if way < 0.55 else self.prompt
        instruction = said()
        replies = work(instruction, problem, expert=self.expert)
        if way < 0.55:
            head = "[worker/worker]\n" if 0.4 <= way < 0.45 else ""  # as in a pipeline
            return self.of(replies, DO, head + instruction + problem)
        return self.of(replies, instruction, problem)

    def after_examples(self) -> Lesson:
        """A problem after worked examples, all of them right or all wrong, or as they come."""
        rng, mixed = self.rng, self.rng.random()
        examples, texts = [], list[str]()
        for _ in range(rng.randint(1, MAX_EXAMPLES)):
            problem = self.problem()
            right = rng.random() < 0.5 if mixed < 0.2 else mixed < 0.7
            said = digit(problem[0], problem)
            if not right:
                said = str((int(said) + rng.randrange(1, 10)) % 10)
            examples.append((problem, said))
            texts += [problem, said]
        problem, prompt = self.problem(), self.prompt()
        replies = work(prompt, problem, examples=examples, expert=self.expert)
        return self.of(replies, prompt, *texts, problem)

    def among_others(self) -> Lesson:
        """A problem with what others answered: in one message, or in the next one after an answer
        of its own, which then counts as one of them."""
        rng, problem, prompt = self.rng, self.problem(), self.prompt()
        second = rng.random() < 0.4
        names = sorted(rng.sample(NAMES, rng.randint(1, 2 if second else MAX_OTHERS)))
        pool = [*work(self.amounts(), problem)] if rng.random() < 0.7 else [*map(str, range(10))]
        said = rng.choices(pool, k=len(names) + second)
        quotes = "\n\n".join(f"[{name}] {each}" for name, each in zip(names, said, strict=False))
        replies = work(prompt, problem, said, expert=self.expert)
        if second:
            return self.of(replies, prompt, problem, said[-1], quotes)
        return self.of(replies, prompt, f"{problem} {quotes}")

    def program(self) -> Lesson:
        """A designer of programs, in its first or its second round."""
        rng, problem = self.rng, self.problem()
        kind = problem[0] if rng.random() < 0.8 else OWN.lower()
        asked = problem if kind != OWN.lower() else kind + problem[1:]
        if rng.random() < 0.5:
            return self.of(design(kind), DESIGN, asked)
        form = PROGRAM if rng.random() < 0.75 else BROKEN
        feedback = "invalid" if form == BROKEN else rng.choice(FEEDBACK[:3])
        first = form.replace("K", self.letter())
        return self.of(design(kind, [(first, feedback)]), DESIGN, asked, first, feedback)

    def workflow(self) -> Lesson:
        """A designer of workflows, told a kind, or `k`."""
        kind = self.rng.choice([*KINDS, OWN.lower()])
        return self.of(workflow(kind), STEPS, kind)


def _next_signs(replies: Answers, beginning: str) -> dict[str, float]:
    """Shares of the characters that come next in the replies that begin so."""
    found: Counter[str] = Counter()
    for text, share in replies.items():
        if text.startswith(beginning):
            found[text[len(beginning)]] += share  # type: ignore[assignment]
    total = sum(found.values())
    return {sign: share / total for sign, share in found.items()}
