"""`task_args.extract`: final answers of worked solutions, found out or as told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.rollouts.tasks.final_answers import extractor
from marlora.rollouts.tasks.registry import load_tasks


@pytest.mark.parametrize(
    ("how", "text", "expected"),
    [
        ("gsm8k", "2+2=4, then #### 3, no: #### 1,204 ", "1204"),
        ("gsm8k", "1204", None),
        ("boxed", r"\boxed{1}, or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", "1/2", None),
        (r"=> (\w+)", "a => b => c.", "c"),
        (r"=> ?\w+", "a => b => c.", "=> c"),
        (r"=> (\w*)", "a => ", None),
        (r"=> (\w+)", "nothing", None),
        ("Answer", "Answer", "Answer"),
    ],
)
def test_where_the_answer_stands(how: str, text: str, expected: str | None) -> None:
    find = extractor(how, [])
    assert find is not None and find(text) == expected


def test_hashes_are_found_only_where_every_row_has_them() -> None:
    find = extractor(None, ["a #### 1", "b #### 2"])
    assert find is not None and find("c #### 3") == "3"
    for golds in ([], ["a #### 1", "2"], ["a #### 1", None], [["#### 1"]], [1, 2]):
        assert extractor(None, golds) is None, golds
    assert extractor("none", ["a #### 1"]) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gsm8", "task_args.extract: expected gsm8k, boxed, none or .*; did you mean 'gsm8k'"),
        ("(", r"task_args.extract: .*, got '\(' \(missing"),
        ("", "task_args.extract: expected"),
        (4, "task_args.extract: .*, got 4"),
    ],
)
def test_what_is_no_way_to_find_it_is_an_error(how: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        extractor(how, [])


def written(path: Path, answers: list[Any]) -> str:
    rows = [{"prompt": f"{path.stem} {n}", "answer": a} for n, a in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_file_a_folder_and_a_set_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "one.jsonl", [f"sum #### {n}" for n in range(20)])
    assert {t.answer for t in load_tasks(file, num_eval=2)} < set(map(str, range(20)))
    assert load_tasks(file, num_eval=2, extract="none")[0].answer.startswith("sum ####")
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder / "train.jsonl", ["x #### 1"])
    written(folder / "validation.jsonl", ["x #### 2", "3 of them"])
    assert load_tasks(str(folder))[0].answer == "x #### 1"  # not every row has it
    assert load_tasks(str(folder), extract=r"(\d+)")[0].answer == "1"
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    written(folder / "validation.jsonl", ["x #### 2"])
    (held_out,) = load_tasks(f"hub:{folder}", "eval")
    assert held_out.answer == "2"


def test_a_row_without_an_answer_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "one.jsonl", [r"\boxed{1}", "none here"])
    with pytest.raises(SettingError, match=r"row 2: no final answer in 'none here'; task_args.ext"):
        load_tasks(file, extract="boxed")
