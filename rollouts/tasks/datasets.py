"""Loaders that turn rows of data sets into tasks: GSM8K, MATH, anything `datasets` loads, and
JSONL, JSON and Parquet files."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.text.answers import extract
from ...agents.types import SettingError, Task, nearest

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
    if not 0 < eval_fraction < 1:
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
        "gsm8k", rows, seed, {"prompt": "question", "answer": "answer"}, _after_hashes
    )


def math(
    *, split: str, seed: int, path: str = "DigitalLearningGmbH/MATH-lighteval"
) -> Iterator[Task]:
    r"""Competition problems (MATH, arXiv:2103.03874) with their own splits; the answer is in the
    solution's last `\boxed{}`."""
    rows = rows_of("math", path, split, None)
    return _from_columns(
        "math", rows, seed, {"prompt": "problem", "answer": "solution"}, _in_the_box
    )


def hub(
    path: str, *, split: str, seed: int, config: str | None = None, **columns: Any
) -> Iterator[Task]:
    """A data set of the hub, or a local copy: its split `train`, and the first it has of `eval`,
    `test`, `validation`.

    `columns`: `fields` and `public` as in `file`.
    """
    return _from_columns(path, rows_of(path, path, split, config), seed, **columns)


def file(
    path: Path,
    *,
    split: str,
    seed: int,
    fields: Mapping[str, str | None] | None = None,
    public: Sequence[str] = (),
    eval_fraction: float = 0.2,
    num_eval: int | None = None,
) -> Iterator[Task]:
    """Rows of a JSONL, JSON or Parquet file as tasks, or of a folder's files `train*` and `eval*`
    (or `test*`).

    Args:
        fields: the columns that hold `prompt`, `answer` and `id`, where they are named otherwise;
            `answer: null` if there is none.
        public: columns that the team may see, as `task.meta[column]`. All others are private, as
            `task.meta["_column"]`.
        eval_fraction: share of a single file that is held out. `num_eval`: hold out just so many
            instead.
    """
    if path.is_dir():
        parts = {each: _files(path, each) for each in SPLITS}
        if not all(parts.values()):
            raise SettingError(
                f"tasks {str(path)!r}: expected files train* and eval* (or test*),"
                f" {', '.join(READERS)}, in the folder"
            )
        rows = {
            each: [row for part in paths for row in read(part)] for each, paths in parts.items()
        }
        return _from_columns(str(path), Splits(rows, split), seed, fields, None, public)
    tasks = list(_tasks(str(path), read(path), fields, None, public))
    if num_eval is not None:
        if not 0 < num_eval < len(tasks):
            raise SettingError(
                f"task_args.num_eval: expected 1 to {len(tasks) - 1} of the {len(tasks)} tasks, got"
                f" {num_eval}"
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


Answer = Callable[[str], "str | None"]


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


def _tasks(
    name: str,
    rows: Iterable[Mapping[str, Any]],
    fields: Mapping[str, str | None] | None,
    answer: Answer | None,
    public: Sequence[str],
) -> Iterator[Task]:
    """Rows as tasks. A row that stands twice is one task; ids are the rows' own, or a hash of
    prompt and answer."""
    column = {"prompt": "prompt", "answer": "answer", "id": "id"}
    for key in fields or {}:
        if key not in column:
            raise SettingError(
                f"task_args.fields.{key}: no such field of a task; {nearest(key, column)}"
            )
    column |= dict(fields or {})  # type: ignore[arg-type]
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        expected = [
            c
            for c in (column["prompt"], column["answer"], *public, (fields or {}).get("id"))
            if c is not None
        ]
        if missing := [c for c in expected if c not in row]:
            hint = (
                "; name yours with task_args.fields.prompt, .answer"
                if set(missing) & {"prompt", "answer"}
                else ""
            )
            raise SettingError(
                f"tasks {name!r}, row {number}: no column {missing[0]!r}; found {sorted(row)},"
                f" expected {expected}{hint}"
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
                f" {row[str(column['answer'])]!r:.120}"
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


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


def digest(*parts: Any) -> str:
    """A short name for what a task is made of."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def jsonable(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _after_hashes(text: str) -> str | None:
    return text.rsplit("####", 1)[1].strip().replace(",", "") if "####" in text else None


def _in_the_box(text: str) -> str | None:
    return extract(text) if "\\boxed" in text or "\\fbox" in text else None


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
        raise SettingError(
            f"tasks {name!r}: {path} cannot be loaded ({reason}); task_args.path takes a local copy"
        ) from error
    held_out = next((each for each in ("eval", "test", "validation") if each in loaded), None)
    if "train" not in loaded or held_out is None:
        raise SettingError(
            f"tasks {name!r}: {path} has the splits {sorted(loaded)}; expected train, and eval,"
            " test or validation"
        )
    return Splits({"train": list(loaded["train"]), "eval": list(loaded[held_out])}, split)


def _files(folder: Path, split: str) -> list[Path]:
    starts = ("train",) if split == "train" else ("eval", "test")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.stem.startswith(starts) and path.suffix in READERS
    ]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in READERS:
        raise SettingError(
            f"tasks {str(path)!r}: cannot read {path.suffix!r}; expected {', '.join(READERS)}"
        )
    rows = READERS[path.suffix](path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingError(f"tasks {str(path)!r}: expected one mapping of columns per task")
    if not rows:
        raise SettingError(f"tasks {str(path)!r}: no rows; expected columns prompt and answer")
    return rows


def _text(path: Path) -> str:
    """The text of a file of tasks in UTF-8, without a byte order mark."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise SettingError(
            f"tasks {str(path)!r}, line {line}, byte {byte}: not UTF-8 (0x{data[error.start]:02x});"
            " save the file as UTF-8"
        ) from error


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SettingError(
                    f"tasks {str(path)!r}, line {number}: not JSON ({error})"
                ) from error
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise SettingError(
            f"tasks {str(path)!r}: not JSON ({error}); one row per line is .jsonl"
        ) from error


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise SettingError(f"tasks {str(path)!r}: not Parquet ({error})") from error


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
