"""Loaders that turn rows of data sets into tasks: GSM8K, MATH, anything `datasets` loads, and
files."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.types import SettingError, Task, nearest
from .final_answers import Answer, after_hashes, extractor, in_the_box
from .table_files import HELD_OUT, read, split_files

log = logging.getLogger(__name__)

SPLITS = ("train", "eval")


# which split a task is in


def unit(text: str) -> float:
    """A number in [0, 1) from a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:7], "big") / 2**56


def of_split(
    tasks: Iterable[Task],
    split: str,
    eval_fraction: float,
    key: Callable[[Task], str] = lambda task: task.prompt,
) -> Iterator[Task]:
    """The tasks that the hash of their `key` (their prompt) puts in this split."""
    if not isinstance(eval_fraction, (int, float)) or not 0 < eval_fraction < 1:
        raise SettingError(
            f"task_args.eval_fraction: expected a number between 0 and 1, got {eval_fraction!r}"
        )
    return (
        task
        for task in tasks
        if (unit(f"split of {key(task)}") < eval_fraction) == (split == "eval")
    )


# data sets


def gsm8k(*, split: str, seed: int, path: str = "openai/gsm8k") -> Iterator[Task]:
    """Grade-school word problems (arXiv:2110.14168) with the data set's own splits. `path`: hub
    name, local copy, or a file."""
    rows = rows_of("gsm8k", path, split, "main")
    return _from_columns(
        "gsm8k", rows, seed, {"prompt": "question", "answer": "answer"}, after_hashes
    )


def math(
    *, split: str, seed: int, path: str = "DigitalLearningGmbH/MATH-lighteval"
) -> Iterator[Task]:
    r"""Competition problems (MATH, arXiv:2103.03874) with their own splits; the answer is in the
    solution's last `\boxed{}`."""
    rows = rows_of("math", path, split, None)
    return _from_columns(
        "math", rows, seed, {"prompt": "problem", "answer": "solution"}, in_the_box
    )


def hub(
    path: str,
    *,
    split: str,
    seed: int,
    config: str | None = None,
    fields: Mapping[str, str | None] | None = None,
    public: Sequence[str] = (),
    extract: str | None = None,
) -> Iterator[Task]:
    """A data set of the hub, or a local copy: its split `train`, and the first it has of `eval`,
    `test`, `validation`.

    `config`: its configuration, where it has several. `fields`, `public`, `extract`: as in `file`.
    """
    rows = rows_of(path, path, split, config)
    answer = extractor(extract, answers_of(rows.rows.values(), fields))
    return _from_columns(path, rows, seed, fields, answer, public)


def file(
    path: Path,
    *,
    split: str,
    seed: int,
    fields: Mapping[str, str | None] | None = None,
    public: Sequence[str] = (),
    extract: str | None = None,
    eval_fraction: float = 0.2,
    num_eval: int | None = None,
) -> Iterator[Task]:
    """Rows of a JSONL, JSON, CSV or Parquet file as tasks, or of a folder's files `train*` and
    `eval*` (else `test*`, else `validation*`).

    Args:
        fields: the columns that hold `prompt`, `answer` and `id`, where they are named otherwise;
            `answer: null` if there is none.
        public: columns that the team may see, as `task.meta[column]`. All others are private, as
            `task.meta["_column"]`.
        extract: the final answer in an answer column of worked solutions: `gsm8k` (after `####`),
            `boxed` (in the last `\\boxed{}`), a regular expression (its first group in the last
            match), or `none`. Not given: `gsm8k` if every row has `####`.
        eval_fraction: share of a single file that is held out. `num_eval`: hold out just so many
            instead.
    """
    if path.is_dir():
        rows = {
            each: [row for part in paths for row in read(part)]
            for each, paths in split_files(path).items()
        }
        answer = extractor(extract, answers_of(rows.values(), fields))
        return _from_columns(str(path), Splits(rows, split), seed, fields, answer, public)
    table = read(path)
    answer = extractor(extract, answers_of([table], fields))
    tasks = list(_tasks(str(path), table, fields, answer, public))
    if num_eval is not None:
        if type(num_eval) is not int or not 0 < num_eval < len(tasks):
            raise SettingError(
                f"task_args.num_eval: expected 1 to {len(tasks) - 1} of the {len(tasks)} tasks, got"
                f" {num_eval!r}"
            )
        ranked = sorted(
            {task.prompt for task in tasks}, key=lambda prompt: unit(f"split of {prompt}")
        )
        held_out = set(ranked[:num_eval])
        of_this: Iterable[Task] = (
            task for task in tasks if (task.prompt in held_out) == (split == "eval")
        )
    else:
        of_this = of_split(tasks, split, eval_fraction)
    return shuffled(of_this, seed)


@dataclass(frozen=True)
class Splits:
    """Rows by split, and the split that is asked for."""

    rows: Mapping[str, list[dict[str, Any]]]
    split: str


def _from_columns(
    name: str,
    rows: Splits,
    seed: int,
    fields: Mapping[str, str | None] | None = None,
    answer: Answer | None = None,
    public: Sequence[str] = (),
) -> Iterator[Task]:
    """Rows with columns for prompt and answer, of a set that comes with splits (see
    `own_split`)."""
    return own_split(
        name, rows, seed, lambda split, rows: _tasks(name, rows, fields, answer, public)
    )


def own_split(
    name: str,
    rows: Splits,
    seed: int,
    tasks_of: Callable[[str, list[dict[str, Any]]], Iterable[Task]],
) -> Iterator[Task]:
    """Tasks of a set that comes with splits; training tasks whose prompt is also held out are left
    out. `tasks_of(split, rows)`: the tasks of a split's rows."""
    tasks = {split: list(tasks_of(split, rows_)) for split, rows_ in rows.rows.items()}
    if rows.split == "eval":
        return shuffled(tasks["eval"], seed)
    held_out = {task.prompt for task in tasks["eval"]}
    training = [task for task in tasks["train"] if task.prompt not in held_out]
    if len(training) < len(tasks["train"]):
        log.warning(
            "tasks %r: %d training tasks are also held out; left out of training",
            name,
            len(tasks["train"]) - len(training),
        )
    return shuffled(training, seed)


def shuffled(tasks: Iterable[Task], seed: int) -> Iterator[Task]:
    ordered = sorted(tasks, key=lambda task: task.id)
    random.Random(f"order {seed}").shuffle(ordered)
    return iter(ordered)


def answers_of(
    parts: Iterable[Iterable[Mapping[str, Any]]], fields: Mapping[str, str | None] | None
) -> list[Any]:
    """The answer column of all rows; None where a row has none."""
    column = columns_of(fields)["answer"]
    return [row.get(column) if column is not None else None for part in parts for row in part]


def columns_of(fields: Mapping[str, str | None] | None) -> dict[str, Any]:
    """The columns of prompt, answer (None: there is none) and id. Raises `SettingError` for other
    names."""
    columns: dict[str, Any] = {"prompt": "prompt", "answer": "answer", "id": "id"}
    if fields is not None and not isinstance(fields, Mapping):
        raise SettingError(
            f"task_args.fields: expected columns by name, such as {{prompt: question}}, got"
            f" {fields!r}"
        )
    for key in fields or {}:
        if key not in columns:
            raise SettingError(
                f"task_args.fields.{key}: no such field of a task; {nearest(str(key), columns)}"
            )
    columns |= dict(fields or {})
    if not isinstance(columns["prompt"], str):
        raise SettingError(
            f"task_args.fields.prompt: expected the name of a column, got {columns['prompt']!r}"
        )
    return columns


def _tasks(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    fields: Mapping[str, str | None] | None,
    answer: Answer | None,
    public: Sequence[str],
) -> Iterator[Task]:
    """Rows as tasks. A row that stands twice is one task; ids are the rows' own, or a hash of
    prompt and answer."""
    column = columns_of(fields)
    if isinstance(public, str):
        raise SettingError(f"task_args.public: expected a list of columns, got {public!r}")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        expected = [
            c
            for c in (column["prompt"], column["answer"], *public, (fields or {}).get("id"))
            if c is not None
        ]
        if missing := [c for c in expected if c not in row]:
            raise SettingError(
                f"tasks {name!r}, row {number}: no column {missing[0]!r}; found {sorted(row)},"
                f" expected {expected}{_likely(missing, row)}"
            )
        prompt, gold = (
            row[column["prompt"]],
            row[column["answer"]] if column["answer"] is not None else None,
        )
        if _is_nan(gold):  # how tables write a missing value
            gold = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise SettingError(
                f"tasks {name!r}, row {number}: column {column['prompt']!r} is {prompt!r:.80},"
                " expected a text"
            )
        if answer is not None and (gold := answer(str(gold))) is None:
            raise SettingError(
                f"tasks {name!r}, row {number}: no final answer in"
                f" {row[str(column['answer'])]!r:.120}; task_args.extract says where it stands"
            )
        key = digest(prompt, gold)
        given = None if _is_nan(row.get(column["id"])) else row.get(column["id"])
        if given is None:
            if key in seen:
                continue
            seen.add(key)
        extra = {c: value for c, value in row.items() if c not in column.values()}
        meta = {c if c in public else f"_{c}": jsonable(value) for c, value in extra.items()}
        yield Task(key if given is None else str(given), prompt, jsonable(gold), name, meta=meta)


# what other data sets call these columns
USUAL = {
    "prompt": ("question", "problem", "instruction", "input", "query", "text"),
    "answer": ("solution", "output", "target", "label", "response", "completion"),
}


def _likely(missing: Sequence[str], row: Mapping[str, Any]) -> str:
    """How to name the missing columns of prompt and answer, by those that a row has."""
    names = [field for field in USUAL if field in missing]
    if not names:
        return ""
    likely = {
        field: next((column for column in USUAL[field] if column in row), "COLUMN")
        for field in names
    }
    pairs = ", ".join(f"{field}: {column}" for field, column in likely.items())
    none = " (answer: null if there is none)" if "answer" in names else ""
    return f"; name yours: task_args: {{fields: {{{pairs}}}}}{none}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def digest(*parts: Any) -> str:
    """A short name for what a task is made of."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


# reading


def rows_of(name: str, path: str, split: str, config: str | None) -> Splits:
    """Both splits of a data set by hub name or local folder, through `datasets`; a single file is
    cut in two by hash."""
    local = Path(path).expanduser()
    if local.is_file():
        raise SettingError(
            f"tasks {name!r}: {path} is one file, but this set has two splits; give its folder"
        )
    import datasets

    try:
        named = (
            config if not local.is_dir() or (local / "README.md").exists() else None
        )  # plain folders have no configurations
        loaded = datasets.load_dataset(str(local) if local.exists() else path, named)
    except Exception as error:  # no network, set or configuration: many types of the hub's errors
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        todo = _how_to_load(path, isinstance(error, ConnectionError), own=name == path)
        raise SettingError(f"tasks {name!r}: {path} cannot be loaded ({reason}); {todo}") from error
    held_out = next((each for each in HELD_OUT if each in loaded), None)
    if "train" not in loaded or held_out is None:
        raise SettingError(
            f"tasks {name!r}: {path} has the splits {sorted(loaded)}; expected train, and eval,"
            " test or validation. Save the rows as one JSONL file, which is cut in two by itself"
        )
    return Splits({"train": list(loaded["train"]), "eval": list(loaded[held_out])}, split)


def _how_to_load(path: str, unreachable: bool, own: bool) -> str:
    """What to do about a data set that cannot be loaded. `unreachable`: the hub did not answer.
    `own`: the user has named the set, so that a configuration may be missing."""
    copy = "tasks: hub:FOLDER" if own else "task_args: {path: FOLDER}"
    if unreachable:
        return (
            f"where there is a network, `hf download {path} --repo-type dataset --local-dir FOLDER`"
            f" makes a copy; then {copy}"
        )
    config = "task_args.config names one of its configurations; " if own else ""
    return f"{config}a local copy is named by {copy}"
