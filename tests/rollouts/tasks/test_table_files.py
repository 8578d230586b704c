"""Files of tasks: kinds, folders with splits, and what errors say of them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.tasks.datasets import SPLITS
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.tasks.table_files import read, split_files


def test_a_csv_file_has_texts_under_names(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,answer\n"What is 1, and\n2?",3\nq,\n', encoding="utf-8")
    assert read(path) == [
        {"prompt": "What is 1, and\n2?", "answer": "3"},
        {"prompt": "q", "answer": ""},
    ]
    for rows in ("prompt,answer\nq\n", "prompt,answer\nq,1,2\n"):
        path.write_text(rows, encoding="utf-8")
        with pytest.raises(SettingError, match="row 2: not as many values"):
            read(path)


def test_the_first_held_out_split_of_a_folder_counts(tmp_path: Path) -> None:
    names = ["train-0.jsonl", "train-1.csv", "test.jsonl", "validation.jsonl", "eval.md"]
    for name in names:
        (tmp_path / name).touch()
    found = split_files(tmp_path)
    assert [path.name for path in found["train"]] == ["train-0.jsonl", "train-1.csv"]
    assert [path.name for path in found["eval"]] == ["test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    assert [path.name for path in split_files(tmp_path)["eval"]] == ["validation.jsonl"]
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(SettingError, match=r"found train-0.jsonl, train-1.csv. A single file is"):
        split_files(tmp_path)


@pytest.mark.parametrize(
    ("columns", "args", "message"),
    [
        (
            ("question", "solution"),
            {},
            r"name yours: task_args: \{fields: \{prompt: question, answer: solution\}\} \(answer: nu",
        ),
        (("prompt", "gold"), {}, r"\{fields: \{answer: COLUMN\}\}"),
        (("q", "answer"), {}, r"\{fields: \{prompt: COLUMN\}\}$"),
        (("a", "b"), {"fields": "question"}, "fields: expected columns by name, such as {prompt:"),
        (("a", "b"), {"fields": {"prompt": None}}, "fields.prompt: expected the name of a column"),
        (("prompt", "answer"), {"public": "topic"}, "public: expected a list of columns"),
        (("prompt", "answer"), {"eval_fraction": "0.2"}, "expected a number between 0 and 1"),
        (("prompt", "answer"), {"num_eval": "1"}, "num_eval: expected 1 to 1 of the 2 tasks"),
    ],
)
def test_errors_say_what_to_write(
    tmp_path: Path, columns: tuple[str, ...], args: dict[str, Any], message: str
) -> None:
    rows = [dict.fromkeys(columns, text) for text in ("x", "y")]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(SettingError, match=message):
        load_tasks(str(path), **args)


def test_a_set_of_the_hub_says_how_to_name_a_configuration_or_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    copy = r"`hf download someone/set --repo-type dataset --local-dir FOLDER` makes a copy; then "
    with pytest.raises(SettingError, match=copy + "tasks: hub:FOLDER"):
        load_tasks("hub:someone/set")
    with pytest.raises(SettingError, match=copy + r"task_args: \{path: FOLDER\}"):
        load_tasks("gsm8k", path="someone/set")
    (tmp_path / "train.jsonl").write_text("no rows", encoding="utf-8")
    with pytest.raises(SettingError, match=r"task_args.config names .* named by tasks: hub:FOLDER"):
        load_tasks(f"hub:{tmp_path}")
    with pytest.raises(SettingError, match="a data set of the hub is named hub:someone/set"):
        load_tasks("someone/set")


ROWS = [
    {"question": f"{a}+1", "answer": a + 1, "seen": datetime(2026, 1, a), "steps": [{"a": a}]}
    for a in range(1, 21)
]


def test_parquet_files_and_folders_are_read(tmp_path: Path) -> None:
    table, fields = pyarrow.Table.from_pylist(ROWS), {"prompt": "question"}
    pyarrow.parquet.write_table(table, tmp_path / "tasks.parquet")
    split = [load_tasks(str(tmp_path / "tasks.parquet"), s, fields=fields) for s in SPLITS]
    assert len(split[0]) + len(split[1]) == 20 and split[0] and split[1]
    task = next(t for part in split for t in part if t.prompt == "3+1")
    assert (task.answer, task.meta) == (4, {"_seen": "2026-01-03 00:00:00", "_steps": [{"a": 3}]})
    assert task.public().meta == {}
    folder = tmp_path / "set"
    folder.mkdir()
    for name, part in (("train-00000-of-00002", 0), ("train-00001-of-00002", 8), ("test", 16)):
        rows = table.slice(part, 4 if name == "test" else 8)
        pyarrow.parquet.write_table(rows, folder / f"{name}.parquet")
    assert [len(load_tasks(str(folder), s, fields=fields)) for s in SPLITS] == [16, 4]


def test_parquet_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(SettingError, match="not Parquet"):
        load_tasks(str(path))
    with pytest.raises(SettingError, match=f"a folder of such files is named itself: {tmp_path}"):
        load_tasks(f"{tmp_path}/*.parquet")
    with pytest.raises(
        SettingError, match=f"copy of a data set of the hub; name that hub:{tmp_path}"
    ):
        load_tasks(str(tmp_path))
