import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from marlora.agents.types import SettingError, Task
from marlora.rollouts.tasks.registry import LEVELS, load_tasks, split_hash


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(count, start=0):
    return [{"prompt": f"q{n}", "answer": n} for n in range(start, start + count)]


def both(name, **args):
    return load_tasks(name, "train", **args), load_tasks(name, "eval", **args)


# arithmetic


def test_arithmetic_splits_are_disjoint_over_seeds_and_complete():
    train, held_out = both("arithmetic", level=2)
    other = load_tasks("arithmetic", "train", seed=1, level=2)
    assert (
        len({t.id for t in train} | {t.id for t in held_out}) == len(train) + len(held_out) == 1000
    )
    assert {t.id for t in train} == {t.id for t in other} and [t.id for t in train] != [
        t.id for t in other
    ]
    assert (
        150 < len(held_out) < 250
        and {t.split for t in train} == {"train"}
        and {t.split for t in held_out} == {"eval"}
    )


def test_arithmetic_is_the_same_every_time_and_shorter_is_a_beginning():
    tasks = load_tasks("arithmetic", seed=3, level=4, num_tasks=50)
    assert load_tasks("arithmetic", seed=3, level=4, num_tasks=50) == tasks and len(tasks) == 50
    assert load_tasks("arithmetic", seed=3, level=4, limit=7) == tasks[:7]


@pytest.mark.parametrize("level", LEVELS)
def test_arithmetic_answers_and_operands(level):
    count, high, signs = LEVELS[level]
    tasks = load_tasks("arithmetic", level=level, limit=40)
    for task in tasks:
        expression = task.meta["expression"]
        assert (
            int(task.answer) == eval(expression) == task.meta["_steps"][-1]
            and expression in task.prompt
        )
        operands = [task.meta[name] for name in "abcdefgh"[:count]]
        ops = [task.meta[f"op{n}"] for n in range(1, count)]
        assert all(0 <= x <= high for x in operands) and set(ops) <= set(signs)
        pieces = [str(operands[0])]
        for n, (op, x) in enumerate(zip(ops, operands[1:], strict=True)):
            pieces += [op, str(x)]
            assert task.meta["_steps"][n] == eval(" ".join(pieces))
    assert {op for t in tasks for op in t.meta["expression"] if op in "+-*"} == set(signs)


def test_a_team_sees_operands_but_neither_answer_nor_steps():
    task = load_tasks("arithmetic", limit=1)[0].public()
    assert task.answer is None and set(task.meta) == {
        "level",
        "expression",
        "a",
        "b",
        "c",
        "op1",
        "op2",
    }


def test_levels_mix_in_turn_and_the_prompt_is_a_template():
    tasks = load_tasks("arithmetic", level=[1, 3], num_tasks=6, template="{expression}=")
    assert [t.meta["level"] for t in tasks] == [1, 3, 1, 3, 1, 3] and tasks[0].prompt == tasks[
        0
    ].meta["expression"] + "="


def test_one_hash_for_one_set_of_tasks():
    tasks = load_tasks("arithmetic", limit=20)
    assert split_hash(tasks) == split_hash(tasks[::-1]) != split_hash(tasks[1:])
    code = (
        "from marlora.rollouts.tasks.registry import *; print(split_hash(load_tasks('arithmetic',"
        " limit=20)))"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == split_hash(tasks)


# files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_is_split_by_what_its_prompts_say(tmp_path, suffix):
    path = write(tmp_path / f"set{suffix}", questions(200))
    train, held_out = both(path)
    assert len(train) + len(held_out) == 200 and 20 < len(held_out) < 60
    longer = write(tmp_path / f"longer{suffix}", questions(300))
    assert {t.prompt for t in held_out} <= {
        t.prompt for t in load_tasks(longer, "eval")
    }  # growing a file moves no task
    assert {t.answer for t in train + held_out} == set(range(200))


def test_num_eval_holds_out_just_so_many(tmp_path):
    train, held_out = both(write(tmp_path / "set.jsonl", questions(50)), num_eval=5, seed=2)
    assert (len(train), len(held_out)) == (45, 5) and not {t.id for t in train} & {
        t.id for t in held_out
    }


def test_columns_by_name_and_privacy(tmp_path):
    rows = [
        {"question": f"q{n}", "solution": "x", "topic": "sums", "hint": ["see", n], "key": n}
        for n in range(20)
    ]
    path = write(tmp_path / "set.jsonl", rows)
    tasks = load_tasks(
        path, fields={"prompt": "question", "answer": "solution", "id": "key"}, public=["topic"]
    )
    assert (
        tasks[0].meta["topic"] == "sums"
        and tasks[0].meta["_hint"] == ["see", int(tasks[0].id)]
        and tasks[0].answer == "x"
    )
    assert set(tasks[0].public().meta) == {"topic"}
    assert load_tasks(path, fields={"prompt": "question", "answer": None})[0].answer is None


def test_same_prompts_stay_on_one_side_and_same_rows_are_one_task(tmp_path):
    rows = (
        questions(40) + questions(40) + [{"prompt": f"q{n}", "answer": "other"} for n in range(40)]
    )
    train, held_out = both(write(tmp_path / "set.jsonl", rows))
    assert len(train) + len(held_out) == 80 and not {t.prompt for t in train} & {
        t.prompt for t in held_out
    }


def test_a_folder_with_splits_keeps_them_and_training_loses_what_is_held_out(tmp_path, caplog):
    write(tmp_path / "train-0.jsonl", questions(10))
    write(tmp_path / "train-1.parquet", questions(10, start=10))
    write(tmp_path / "test.jsonl", questions(6, start=17))
    train, held_out = both(str(tmp_path))
    assert (
        sorted(t.prompt for t in held_out) == [f"q{n}" for n in range(17, 23)] and len(train) == 17
    )
    assert "3 training tasks are also held out" in caplog.text


@pytest.mark.parametrize(
    ("rows", "args", "message"),
    [
        ([], {}, "no rows; expected columns prompt and answer"),
        (
            [{"question": "q", "answer": 1}],
            {},
            (
                r"row 1: no column 'prompt'; found \['answer', 'question'\], expected \['prompt',"
                r" 'answer'\]"
            ),
        ),
        ([{"prompt": "q", "answer": 1}, {"prompt": "r"}], {}, "row 2: no column 'answer'"),
        ([{"prompt": "q"}], {"fields": {"answer": "gold"}}, "no column 'gold'"),
        ([{"prompt": "", "answer": 1}], {}, "row 1: column 'prompt' is '', expected a text"),
        ([{"prompt": "q", "answer": 1}], {"public": ["topic"]}, "no column 'topic'"),
        (
            [{"id": "x", "prompt": "q", "answer": 1}, {"id": "x", "prompt": "q", "answer": 2}],
            {},
            "two tasks have the id 'x'",
        ),
        (
            questions(1),
            {"fields": {"promt": "q"}},
            "task_args.fields.promt: no such field of a task; did you mean 'prompt'",
        ),
        (questions(1), {"feilds": {}}, "task_args.feilds: .* did you mean 'fields'"),
        (questions(9), {"num_eval": 9}, "num_eval: expected 1 to 8"),
        (questions(9), {"eval_fraction": 1.0}, "eval_fraction: expected a number between 0 and 1"),
    ],
)
def test_bad_files_are_named_with_what_was_found_and_expected(tmp_path, rows, args, message):
    path = write(tmp_path / "set.jsonl", rows)
    with pytest.raises(SettingError, match=message):
        both(path, **args)


def test_an_empty_split_is_an_error(tmp_path):
    path = write(tmp_path / "set.jsonl", questions(1))
    with pytest.raises(SettingError, match="split is empty"):
        both(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "tasks 'arithmetics': no such tasks; did you mean 'arithmetic'"),
        ("nowhere.jsonl", "no such file"),
        ("no_such_module:make", "cannot be imported"),
        ("json:nothing", "cannot be imported"),
    ],
)
def test_a_set_that_cannot_be_found(name, message):
    with pytest.raises(SettingError, match=message):
        load_tasks(name)


def test_broken_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "answer": 1}\n{"prompt": ')
    (tmp_path / "b.parquet").write_text("nonsense")
    (tmp_path / "c.json").write_text('{"prompt": "q"}')
    (tmp_path / "d.xlsx").write_text("prompt,answer\n")
    for name, message in (
        ("a.jsonl", "line 2: not JSON"),
        ("b.parquet", "not Parquet"),
        ("c.json", "one mapping"),
        ("d.xlsx", "cannot read '.xlsx'; expected .jsonl, .json, .csv, .parquet; with pandas"),
    ):
        with pytest.raises(SettingError, match=message):
            load_tasks(str(tmp_path / name))


def test_bad_arguments_of_load_tasks():
    for args, message in (
        ({"split": "test"}, "expected one of train, eval"),
        ({"limit": 0}, "limit 0"),
        ({"level": 9}, "expected one of"),
    ):
        with pytest.raises(SettingError, match=message):
            load_tasks("arithmetic", **args)


# functions


def pairs(*, split, seed, count=3):
    return [Task(f"{split}{n}", f"{seed} and {n}?", seed + n) for n in range(count)]


def twice(*, split, seed):
    return [Task("x", "?"), Task("x", "!")]


def test_a_function_makes_tasks(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_tasks", sys.modules[__name__])
    tasks = load_tasks("my_tasks:pairs", "eval", seed=4, count=2)
    assert [(t.id, t.answer, t.split, t.source) for t in tasks] == [
        ("eval0", 4, "eval", "my_tasks:pairs"),
        ("eval1", 5, "eval", "my_tasks:pairs"),
    ]
    with pytest.raises(SettingError, match="two tasks have the id 'x'"):
        load_tasks("my_tasks:twice")
    with pytest.raises(SettingError, match="did you mean 'count'"):
        load_tasks("my_tasks:pairs", counts=2)


# data sets and reasoning-gym


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_gsm8k_from_a_local_copy(tmp_path, offline):
    rows = [{"question": f"q{n}", "answer": f"1+{n}={n}\n#### {n},000"} for n in range(4)]
    write(tmp_path / "copy/main/train-00000-of-00001.parquet", rows[:3])
    write(tmp_path / "copy/main/test-00000-of-00001.parquet", rows[3:])
    parts = "".join(
        f"  - {{split: {split}, path: main/{split}-*}}\n" for split in ("train", "test")
    )
    (tmp_path / "copy/README.md").write_text(
        f"---\nconfigs:\n- config_name: main\n  data_files:\n{parts}---\n"
    )
    train, held_out = both("gsm8k", path=str(tmp_path / "copy"))
    assert sorted((t.prompt, t.answer) for t in train) == [
        ("q0", "0000"),
        ("q1", "1000"),
        ("q2", "2000"),
    ]
    assert [(t.prompt, t.answer, t.source) for t in held_out] == [("q3", "3000", "gsm8k")]
    assert all(not t.public().meta for t in train)


def test_math_from_a_local_copy(tmp_path, offline):
    rows = [
        {
            "problem": f"p{n}",
            "solution": rf"so \boxed{{\frac{{{n}}}{{2}}}}.",
            "level": "Level 1",
            "type": "Algebra",
        }
        for n in range(3)
    ]
    write(tmp_path / "copy/train.jsonl", rows[:2])
    write(tmp_path / "copy/test.jsonl", rows[2:])
    train, held_out = both("math", path=str(tmp_path / "copy"))
    assert (
        sorted(t.answer for t in train) == [r"\frac{0}{2}", r"\frac{1}{2}"]
        and held_out[0].meta["_type"] == "Algebra"
    )
    write(
        tmp_path / "copy/test.jsonl",
        [{"problem": "p", "solution": "no box", "level": "", "type": ""}],
    )
    with pytest.raises(SettingError, match="row 1: no final answer in 'no box'"):
        load_tasks("math", path=str(tmp_path / "copy"))


def test_a_data_set_that_cannot_be_loaded(tmp_path, offline):
    with pytest.raises(
        SettingError,
        match=r"tasks 'gsm8k': .* cannot be loaded .* a local copy is named by task_args",
    ):
        load_tasks("gsm8k", path=str(tmp_path))
    with pytest.raises(SettingError, match="is one file"):
        load_tasks("gsm8k", path=write(tmp_path / "x.jsonl", questions(1)))


@pytest.mark.slow
def test_reasoning_gym_sets():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(SettingError, match="no such set; did you mean 'chain_sum'"):
        load_tasks("reasoning-gym:chain_sums")
    train, held_out = both("reasoning-gym:chain_sum", num_tasks=30, min_terms=2, max_terms=3)
    assert (
        len(train) == 30
        and len(held_out) == 30
        and not {t.prompt for t in train} & {t.prompt for t in held_out}
    )
    assert train == load_tasks("reasoning_gym/chain_sum", num_tasks=30, min_terms=2, max_terms=3)
    assert (
        train[0].source == "reasoning-gym:chain_sum"
        and train[0].public().meta == {}
        and json.dumps(train[0].meta)
    )
    assert not {t.prompt for t in load_tasks("reasoning-gym:chain_sum", seed=9, num_tasks=30)} & {
        t.prompt for t in held_out
    }
    with pytest.raises(SettingError, match="min_term"):
        load_tasks("reasoning-gym:chain_sum", min_term=2)
