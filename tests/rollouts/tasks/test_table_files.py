"""Files of tasks: kinds, folders with splits, and what errors say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
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
    with pytest.raises(SettingError, match=r"task_args.config names .* copy is named hub:FOLDER"):
        load_tasks("hub:someone/nothing-of-that-name")
