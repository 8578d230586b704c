"""Gold answers that no reply can match are reported before the first step."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError, Task
from marlora.rollouts.rewards.builtin import close, correct, em, exact, f1, length, right
from marlora.rollouts.rewards.gold import check_answers
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.spec import RunSpec

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n48+24 = 72 altogether.\n#### 72"
NAN = float("nan")


def value(fn: Any, gold: Any, output: str) -> float:
    task = Task("t", "?", gold)
    (reward,) = asyncio.run(score(task, Episode("e", "g", task, output=output), [fn]))
    return reward.value


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        (GSM8K, "task_args.extract says where its answer stands"),
        (
            r"We add and get the answer $\boxed{72}$.",
            "task_args.extract says where its answer stands",
        ),
        ("Final answer: 72", "task_args.extract says where its answer stands"),
        ([GSM8K, GSM8K], "task_args.extract says where its answer stands"),
        (None, "there is no gold answer"),
        (NAN, "there is no gold answer"),
        ("", "there is no gold answer"),
        (" \n", "there is no gold answer"),
        ([], "there is no gold answer"),
        ([None, NAN, ""], "there is no gold answer"),
        ({"value": 72}, "neither a text, a number"),
        ({}, "neither a text, a number"),
        ([["seventy", "two"]], "neither a text, a number"),
    ],
)
@pytest.mark.parametrize("fn", [correct, right])
def test_answers_that_no_reply_can_match_are_refused(gold: Any, why: str, fn: Any) -> None:
    with pytest.raises(SettingError, match="no reply can earn reward") as raised:
        check_answers([Task("t", "?", gold)], [fn], "training")
    told = str(raised.value)
    assert why in told and ("task_args.fields.answer" in told or "store it as a text" in told)
    worth = value(correct, gold, "72")
    assert math.isnan(worth) or worth == 0.0  # and so it is


@pytest.mark.parametrize(
    ("gold", "reply"),
    [
        ("72", "72"),
        (72, "Answer: 72"),
        (True, "true"),
        ("New York", "New York"),
        ("#### 72", "72"),
        (r"\boxed{72}", "72"),
        ("48+24 = 72\n#### 72", "72"),
        ("x = 5; y = 3", r"\boxed{x = 5; y = 3}"),
        ([GSM8K, "72"], "72"),
        ([None, "72"], "72"),
        ([[7, 2]], "Answer: [7, 2]"),
        ("The answer is blowing in the wind", "The answer is blowing in the wind"),
    ],
)
def test_answers_that_a_reply_can_match_are_taken(gold: Any, reply: str) -> None:
    assert check_answers([Task("t", "?", gold)], [correct, right], "training") == []
    assert value(correct, gold, reply) == 1.0


def test_each_reward_is_judged_by_what_it_reads() -> None:
    def accepts(fn: Any, gold: Any, **meta: Any) -> bool:
        try:
            return check_answers([Task("t", "?", gold, meta=meta)], [fn], "training") == []
        except SettingError:
            return False

    assert accepts(exact, GSM8K) and accepts(exact, "") and not accepts(exact, NAN)
    assert accepts(f1, GSM8K) and not accepts(em, GSM8K) and not accepts(close, "#### 72")
    assert accepts(length, None)  # it compares with nothing
    assert accepts(correct, None, _tests="assert True")
    assert accepts(correct, None, _reasoning_gym={})


def test_some_of_many_are_a_warning_that_counts_them() -> None:
    tasks = [Task("a", "?", "1"), Task("b", "?", GSM8K), Task("c", "?", "")]
    (warning,) = check_answers(tasks, [correct], "training")
    assert "in 2 of 3 training tasks, such as 'b'" in warning


@pytest.mark.parametrize("missing", [None, NAN, [None, NAN], []])
def test_no_reply_is_the_text_of_a_missing_answer(missing: Any) -> None:
    for fn in (correct, em, f1):
        assert math.isnan(value(fn, missing, "nan")) and math.isnan(value(fn, missing, "None"))


def written(folder: Path, answers: list[Any]) -> Path:
    path = folder / "tasks.jsonl"
    rows = [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_nan_in_a_file_is_a_missing_answer(tmp_path: Path) -> None:
    path = written(tmp_path, [NAN, "1", 2.5, None])
    tasks = [t for split in ("train", "eval") for t in load_tasks(str(path), split, num_eval=2)]
    answers = {task.prompt: task.answer for task in tasks}
    assert answers == {"0?": None, "1?": "1", "2?": 2.5, "3?": None}


def test_nan_as_an_id_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"{n}?", "answer": "1", "id": NAN} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = [t for split in ("train", "eval") for t in load_tasks(str(path), split, num_eval=2)]
    assert len({task.id for task in tasks}) == 4 and "nan" not in {task.id for task in tasks}


def test_a_run_on_worked_solutions_is_refused_before_it_starts(tmp_path: Path) -> None:
    path = written(tmp_path, [GSM8K] * 10)
    config = RunConfig(output_dir=str(tmp_path / "run"), model="m", tasks=str(path))
    read = RunSpec.resolve(config, Chain(["a"]))  # every row has ####
    assert read.warnings == () and {task.answer for task in read.tasks} == {"72"}
    config.task_args = {"extract": "none"}
    with pytest.raises(SettingError, match=r"no reply can earn reward 'correct' in (\d+) of \1 "):
        RunSpec.resolve(config, Chain(["a"]))
    some = [Task("a", "?", GSM8K), Task("b", "?", "1")]
    spec = RunSpec.resolve(config, Chain(["a"]), tasks=some, eval_tasks=[Task("c", "!", "1")])
    assert len(spec.warnings) == 1 and "in 1 of 2 training tasks" in spec.warnings[0]
