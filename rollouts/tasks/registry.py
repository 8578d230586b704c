"""Task sets by name: arithmetic, reasoning-gym's, GSM8K, MATH, HumanEval, MBPP, HotpotQA and DROP,
a file, or a function.

Where a set has no split of its own, the hash of a task's prompt decides whether it is held out,
whatever the seed: what one run trains on, no other run with another seed is evaluated on. `seed`
orders the tasks and chooses among them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...agents.lookup import load_function
from ...agents.types import SettingError, Task, nearest, to_json
from ..json_values import plain
from .code import humaneval, mbpp
from .datasets import SPLITS, digest, file, gsm8k, hub, math, of_split
from .qa import drop, hotpotqa
from .table_files import READERS

NAMES = "abcdefgh"  # operands of `arithmetic`
# level: operands, largest operand, signs
LEVELS = {1: (2, 9, "+"), 2: (3, 9, "+"), 3: (3, 99, "+-"), 4: (3, 99, "+-*"), 5: (5, 999, "+-*")}


def load_tasks(
    name: str, split: str = "train", *, seed: int = 0, limit: int | None = None, **args: Any
) -> list[Task]:
    """The tasks of a set, in an order that `seed` gives.

    Args:
        name: `arithmetic`, `gsm8k`, `math`, `humaneval`, `mbpp`, `hotpotqa`, `drop`,
            `reasoning-gym:SET` (or `reasoning_gym/SET`), `hub:OWNER/NAME`, a JSONL, JSON, CSV or
            Parquet file, a folder of such files named `train*` and `eval*` (or `test*`,
            `validation*`), or `module:function`.
        split: `train` or `eval`; tasks of one are never in the other.
        limit: at most so many.
        args: of the set's function: see `arithmetic`, `reasoning_gym`, `datasets.py`, `code.py`,
            `qa.py`.

    Raises `SettingError` for a set that cannot be found, has no tasks or other columns than
    expected, or holds an id twice.
    """
    if split not in SPLITS:
        raise SettingError(f"tasks {name!r}: split {split!r}, expected one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise SettingError(f"tasks {name!r}: limit {limit}, expected at least 1")
    function, first = _source(name)
    known = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for key in args:
            own = [
                n
                for n, p in known.items()
                if p.kind is p.KEYWORD_ONLY and n not in ("split", "seed")
            ]
            if key not in own:
                raise SettingError(
                    f"task_args.{key}: tasks {name!r} take no such argument; {nearest(key, own)}"
                )
    return _checked(name, split, function(*first, split=split, seed=seed, **args), limit)


def split_hash(tasks: Iterable[Task]) -> str:
    """sha256 of ids, prompts and answers, in whatever order: two runs with one hash were evaluated
    on the same tasks."""
    lines = sorted(json.dumps(to_json([t.id, t.prompt, t.answer]), default=str) for t in tasks)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _source(name: str) -> tuple[Callable[..., Iterable[Task]], tuple[Any, ...]]:
    """The function that makes a set, and its positional arguments."""
    for prefix in ("reasoning-gym:", "reasoning_gym:", "reasoning-gym/", "reasoning_gym/"):
        if name.startswith(prefix):
            return reasoning_gym, (name.removeprefix(prefix),)
    if name.startswith("hub:"):
        return hub, (name.removeprefix("hub:"),)
    if name in SOURCES:
        return SOURCES[name], ()
    path = _path(name)
    if path.exists():
        return file, (path,)
    if path.suffix in READERS or path.is_absolute():
        whole = f"; a folder of such files is named itself: {path.parent}" if "*" in name else ""
        raise SettingError(f"tasks {name!r}: no such file{whole}")
    if "/" in name and ":" not in name:
        raise SettingError(
            f"tasks {name!r}: no such file or folder; a data set of the hub is named hub:{name}"
        )
    return load_function("tasks", name, SOURCES), ()


def _path(name: str) -> Path:
    """The path that a name may be. Raises `SettingError` for what no file can be called."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, a NUL, half a character, ~NOBODY
        raise SettingError(f"tasks {name[:200]!r}: no such task set or file ({error})") from error
    return path


def _checked(name: str, split: str, drawn: Iterable[Task], limit: int | None) -> list[Task]:
    tasks: list[Task] = []
    seen: set[str] = set()
    for task in drawn:
        if not isinstance(task, Task):
            raise SettingError(f"tasks {name!r}: expected Tasks, got {task!r:.80}")
        if task.id in seen:
            raise SettingError(
                f"tasks {name!r}: two tasks have the id {task.id!r}; ids tell tasks apart, so make"
                " them unique"
            )
        seen.add(task.id)
        tasks.append(dataclasses.replace(task, split=split, source=task.source or name))
        if len(tasks) == limit:
            break
    if not tasks:
        raise SettingError(
            f"tasks {name!r}: the {split} split is empty; it needs more tasks, another"
            " task_args.eval_fraction, or task_args.num_eval, the number to hold out"
        )
    return tasks


# arithmetic


def arithmetic(
    *,
    split: str,
    seed: int,
    level: int | Sequence[int] = 2,
    num_tasks: int = 2000,
    eval_fraction: float = 0.2,
    largest: int | None = None,
    template: str = "What is {expression}?",
) -> Iterator[Task]:
    """Sums and products of whole numbers, without end (up to `num_tasks` are taken).

    Levels: 1 `a + b` and 2 `a + b + c` up to 9; 3 with minus and 4 with times, up to 99; 5 five
    operands up to 999. A list mixes levels in turn; `largest` is another bound of the operands.
    Public meta: the operands `a`, `b`, `c`, ... and the signs `op1`, `op2`, ..., `expression` and
    `level`, for views such as `"{previous}+{c}"`; private `_steps`: the values of `a op1 b`, `a op1
    b op2 c`, ...
    """
    levels = [level] if isinstance(level, int) else list(level)
    for each in levels:
        if each not in LEVELS:
            raise SettingError(f"task_args.level: expected one of {list(LEVELS)}, got {each!r}")
    if largest is not None and largest < 1:
        raise SettingError(f"task_args.largest: expected at least 1, got {largest}")
    streams = [
        of_split(_sums(each, seed, largest, template), split, eval_fraction) for each in levels
    ]
    return itertools.islice(_in_turn(streams), num_tasks)


def _in_turn(streams: list[Iterator[Task]]) -> Iterator[Task]:
    while streams:
        for stream in list(streams):
            task = next(stream, None)
            if task is None:
                streams.remove(stream)
            else:
                yield task


def _sums(level: int, seed: int, largest: int | None, template: str) -> Iterator[Task]:
    """Every sum of a small level once, in random order; of a large one, different sums for as long
    as they are asked for."""
    count, usual, signs = LEVELS[level]
    high = usual if largest is None else largest
    rng = random.Random(f"arithmetic {level} {seed}")
    size = (high + 1) ** count * len(signs) ** (count - 1)
    order: Iterable[int] = (
        rng.sample(range(size), size) if size <= 20_000 else iter(lambda: rng.randrange(size), None)
    )
    seen: set[int] = set()
    for number in order:
        if number in seen:
            continue
        seen.add(number)
        operands, ops, rest = [], [], number
        for _ in range(count):
            rest, operand = divmod(rest, high + 1)
            operands.append(operand)
        for _ in range(count - 1):
            rest, op = divmod(rest, len(signs))
            ops.append(signs[op])
        yield _sum(level, operands, ops, template)


def _sum(level: int, operands: list[int], ops: list[str], template: str) -> Task:
    pieces = [str(operands[0])]
    for op, operand in zip(ops, operands[1:], strict=True):
        pieces += [op, str(operand)]
    expression = " ".join(pieces)
    steps = [_value(operands[: n + 1], ops[:n]) for n in range(1, len(operands))]
    meta = {"level": level, "expression": expression, "_steps": steps}
    meta |= dict(zip(NAMES, operands, strict=False)) | {f"op{n}": op for n, op in enumerate(ops, 1)}
    prompt = template.replace("{expression}", expression)
    return Task(f"arithmetic:{''.join(pieces)}", prompt, str(steps[-1]), "arithmetic", meta=meta)


def _value(operands: list[int], ops: list[str]) -> int:
    total, product = 0, operands[0]
    for op, operand in zip(ops, operands[1:], strict=True):
        if op == "*":
            product *= operand
        else:
            total, product = total + product, operand if op == "+" else -operand
    return total + product


# reasoning-gym


def reasoning_gym(
    set_name: str,
    *,
    split: str,
    seed: int,
    num_tasks: int = 500,
    eval_fraction: float = 0.2,
    **config: Any,
) -> Iterator[Task]:
    """Any set of reasoning-gym by its name; `config` are the set's own settings. Scored by the set
    itself (`rewards.correct`)."""
    try:
        import reasoning_gym as gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise SettingError(
            f"tasks 'reasoning-gym:{set_name}': needs the package reasoning-gym; pip install"
            " 'marlora[tasks]'"
        ) from error
    if set_name not in DATASETS:
        raise SettingError(
            f"tasks 'reasoning-gym:{set_name}': no such set; {nearest(set_name, sorted(DATASETS))}"
        )
    tries = 20 * num_tasks  # a small set repeats itself
    try:
        entries = gym.create_dataset(set_name, seed=seed, **{"size": tries, **config})
    except Exception as error:  # a set checks its own settings, in many ways
        raise SettingError(
            f"tasks 'reasoning-gym:{set_name}': {type(error).__name__}: {error}"
        ) from error
    return itertools.islice(
        of_split(_entries(set_name, entries, config), split, eval_fraction), num_tasks
    )


def _entries(set_name: str, entries: Any, config: dict[str, Any]) -> Iterator[Task]:
    seen: set[str] = set()
    for number in range(len(entries)):
        entry = entries[number]
        key = digest(entry["question"], entry["answer"])
        if key not in seen:
            seen.add(key)
            own = {"name": set_name, "args": config, "entry": plain(entry)}
            answer = None if entry["answer"] is None else str(entry["answer"])
            yield Task(
                f"{set_name}:{key}",
                entry["question"],
                answer,
                f"reasoning-gym:{set_name}",
                meta={"_reasoning_gym": own},
            )


SOURCES: dict[str, Callable[..., Iterable[Task]]] = {
    "arithmetic": arithmetic,
    "gsm8k": gsm8k,
    "math": math,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "hotpotqa": hotpotqa,
    "drop": drop,
}
