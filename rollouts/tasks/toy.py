"""Task sets of the toy models: sums, digits, pairs, programs and rules."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping

from ...agents.lookup import trusted
from ...agents.types import Task
from .datasets import unit

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

ASKED = {
    f"{a}{sign}{b}": value
    for sign, fn in OPERATIONS.items()
    for a in range(10)
    for b in range(10)
    if 0 <= (value := fn(a, b)) <= 9
}

# what each kind of problem adds to the last digit; as an instruction the kind is a capital
KINDS: Mapping[str, int] = {"a": 1, "b": 4, "c": 7}

# what an agent of `rule_tasks` may add to half of a digit, and what each one has to
WAYS = (0, 5)
RULE: Mapping[str, int] = {"first": 5, "last": 0}


@trusted("tasks")
def tiny_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """All three-digit sums of a split, shuffled: 800 to train on, 200 held out of pre-training and
    training alike (`eval`)."""
    tasks = [
        Task(f"{a}{b}{c}", f"{a}+{b}+{c}", str(a + b + c), "tiny", split, {"a": a, "b": b, "c": c})
        for a, b, c in digit_triples()
        if is_held_out(a, b, c) == (split != "train")
    ]
    random.Random(seed).shuffle(tasks)
    return tasks


@trusted("tasks")
def last_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """What the tiny model's agent `last` is asked: the 190 sums of 0 to 18 and a digit, shuffled;
    about two thirds to train on, the others held out. The model has seen all of them, and slips."""
    tasks = [
        Task(asked, asked, str(x + c), "last", split)
        for x in range(19)
        for c in range(10)
        for asked in [f"{x}+{c}"]
        if (unit(f"last {asked}") < 0.35) == (split == "eval")
    ]
    random.Random(seed).shuffle(tasks)
    return tasks


def digit_triples() -> Iterator[tuple[int, int, int]]:
    """All triples of digits, in order."""
    return ((a, b, c) for a in range(10) for b in range(10) for c in range(10))


def is_held_out(a: int, b: int, c: int) -> bool:
    """Whether a triple is one of the 200 that no training sees."""
    return (31 * a + 17 * b + 7 * c) % 5 == 0


@trusted("tasks")
def pair_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """The 152 sums, differences and products of two digits that are a digit, shuffled: about two
    thirds to train on, the others held out."""
    tasks = [
        Task(asked, asked, str(value), "pair", split)
        for asked, value in ASKED.items()
        if (unit(f"pair {asked}") < 0.35) == (split == "eval")
    ]
    random.Random(seed).shuffle(tasks)
    return tasks


@trusted("tasks")
def digit_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """The 1000 tasks of the debate in two halves, `train` and `eval`, shuffled."""
    tasks = [
        Task(f"{n:03}", f"{n:03}", f"{n:03}"[1], "digits", split)
        for n in range(1000)
        if (unit(f"digits {n:03}") < 0.5) == (split == "eval")
    ]
    random.Random(seed).shuffle(tasks)
    return tasks


@trusted("tasks")
def program_tasks(split: str = "train", seed: int = 0, *, kinds: str = "abc") -> list[Task]:
    """The 1000 tasks of each of these kinds in two halves, `train` and `eval`, shuffled. Public
    meta `examples`: two other problems of the kind, with answers."""
    rng, tasks = random.Random(seed), []
    for kind, number in itertools.product(kinds, range(1000)):
        prompt = f"{kind}{number:03}"
        if (unit(f"programs {prompt}") < 0.5) == (split == "eval"):
            others = [f"{kind}{unit(f'{prompt} {n}') * 1000:03.0f}"[:4] for n in range(2)]
            meta = {"kind": kind, "examples": [[other, digit(kind, other)] for other in others]}
            tasks.append(Task(prompt, prompt, digit(kind, prompt), "programs", split, meta))
    rng.shuffle(tasks)
    return tasks


def digit(kind: str, problem: str) -> str:
    """The answer of this kind to a problem, whatever the problem asks for."""
    return str((int(problem[-1]) + KINDS[kind]) % 10)


@trusted("tasks")
def rule_tasks(split: str = "train", seed: int = 0) -> list[Task]:
    """The 1000 numbers of three digits in two halves, `train` and `eval`, shuffled. The answer is
    half of (half of the last digit, plus 5), rounded down; private meta `_first`: the sum, which
    the first agent should say."""
    tasks = []
    for n in range(1000):
        if (unit(f"rules {n:03}") < 0.5) == (split == "eval"):
            first = n % 10 // 2 + RULE["first"]
            answer, meta = str(first // 2 + RULE["last"]), {"_first": str(first)}
            tasks.append(Task(f"{n:03}", f"{n:03}", answer, "rules", split, meta))
    random.Random(seed).shuffle(tasks)
    return tasks
