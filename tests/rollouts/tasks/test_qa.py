"""HotpotQA and DROP: their rows, and their scores against numbers worked out by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
import random

import pytest

from marlora.agents.types import SettingError, Task
from marlora.rollouts.rewards.builtin import correct, em, f1
from marlora.rollouts.rewards.qa import best_pairing, drop_scores, hotpot_scores, scores
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode


@pytest.mark.parametrize(
    ("said", "gold", "exact", "value"),
    [
        ("The Beatles", "beatles", 1.0, 1.0),  # articles and case
        ("Paris, France", "Paris", 0.0, 2 / 3),  # P 1/2, R 1
        ("the the cat", "cat cat", 0.0, 2 / 3),  # a bag: one of two cats; P 1, R 1/2
        ("yes", "Yes.", 1.0, 1.0),
        ("yes it is", "yes", 0.0, 0.0),  # yes and no only whole
        ("no", "no man", 0.0, 0.0),
        ("", "Paris", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # nothing is left of either
        ("3.5", "35", 1.0, 1.0),  # punctuation goes, as in the set's own script
    ],
)
def test_hotpotqa_by_hand(said: str, gold: str, exact: float, value: float) -> None:
    assert hotpot_scores(said, gold) == (exact, pytest.approx(value))


@pytest.mark.parametrize(
    ("said", "gold", "exact", "value"),
    [
        (["2"], ["2.0"], 1.0, 1.0),  # one spelling of numbers
        (["5,000 yards"], ["5000"], 0.0, 2 / 3),  # P 1/2, R 1; the number is there
        (
            ["6 yards"],
            ["5 yards"],
            0.0,
            0.0,
        ),  # another number is worth nothing, however many words agree
        (["yards"], ["5 yards"], 0.0, 0.0),
        (["five yards"], ["yards"], 0.0, 2 / 3),
        (["Tom Brady"], ["tom-brady"], 1.0, 1.0),
        (["a dog", "the cat"], ["cat", "dog"], 1.0, 1.0),  # whatever the order
        (["cat"], ["cat", "dog"], 0.0, 0.5),  # one of two spans
        (["cat", "dog", "bird"], ["cat"], 0.0, 1 / 3),
        (["cat cat"], ["cat"], 0.0, 1.0),  # sets of words, as in the set's own script
        ([], ["cat"], 0.0, 0.0),
        (["red cat", "cat"], ["cat", "red cat"], 1.0, 1.0),
    ],
)
def test_drop_by_hand(said: list[str], gold: list[str], exact: float, value: float) -> None:
    assert drop_scores(said, gold) == (exact, pytest.approx(value))


def test_pairs_are_the_best_there_are() -> None:
    assert best_pairing([[0.9, 0.8], [0.8, 0.1]]) == pytest.approx(1.6)  # a greedy one gives 1.0
    rng = random.Random(0)
    for rows, columns in itertools.product(range(1, 5), repeat=2):
        table = [[rng.random() for _ in range(columns)] for _ in range(rows)]
        if rows <= columns:
            sums = [
                sum(table[r][c] for r, c in enumerate(p))
                for p in itertools.permutations(range(columns), rows)
            ]
        else:
            sums = [
                sum(table[r][c] for c, r in enumerate(p))
                for p in itertools.permutations(range(rows), columns)
            ]
        assert best_pairing(table) == pytest.approx(max(sums))


def test_several_right_answers_and_the_better_one_counts() -> None:
    task = Task("q", "?", [["3"], ["three", "four"]], meta={"_scorer": "drop"})
    assert (
        scores("3", task) == (1.0, 1.0)
        and scores("four | three", task) == (1.0, 1.0)
        and scores("four", task) == (0.0, 0.5)
    )
    other = Task("q", "?", ["New York City", "NYC"])
    assert scores("nyc", other) == (1.0, 1.0) and scores("New York", other) == (
        0.0,
        pytest.approx(0.8),
    )
    with pytest.raises(ValueError, match="no answer"):
        scores("3", Task("q", "?"))


def test_rewards_read_the_answer_out_of_the_output() -> None:
    task = Task("q", "?", ["Paris"], meta={"_scorer": "hotpotqa"})

    def said(output: str | None) -> Episode:
        return Episode("e", "g", task, output=output)

    assert em(task, said("It lies in France.\nAnswer: Paris")) == 1.0 and f1(
        task, said("Paris France")
    ) == pytest.approx(2 / 3)
    assert (
        asyncio.run(correct(task, said("the Paris"))).value == 1.0 and f1(task, said(None)) == 0.0
    )


# rows


def copy(folder, monkeypatch, train, held_out):  # type: ignore[no-untyped-def]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    (folder / "copy").mkdir()
    for name, rows in (("train", train), ("validation", held_out)):
        (folder / f"copy/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "copy")


def test_hotpotqa_from_a_local_copy(tmp_path, monkeypatch) -> None:
    row = {
        "id": "a",
        "question": "Where?",
        "answer": "Paris",
        "type": "bridge",
        "level": "easy",
        "context": {
            "title": ["France", "Spain"],
            "sentences": [["It has ", "a capital."], ["No."]],
        },
    }
    path = copy(
        tmp_path, monkeypatch, [row], [{**row, "id": "b", "question": "When?", "answer": "1990"}]
    )
    (task,), (held_out,) = (
        load_tasks("hotpotqa", path=path),
        load_tasks("hotpotqa", "eval", path=path),
    )
    assert (
        task.prompt == "France: It has a capital.\n\nSpain: No.\n\nQuestion: Where?"
        and task.answer == ["Paris"]
    )
    assert not task.public().meta and (held_out.id, held_out.answer) == ("b", ["1990"])


def test_drop_from_a_local_copy(tmp_path, monkeypatch) -> None:
    row = {
        "section_id": "s",
        "query_id": "a",
        "passage": "Cats and dogs.",
        "question": "Who?",
        "answers_spans": {"spans": ["Cats", "dogs"], "types": ["span", "span"]},
    }
    path = copy(
        tmp_path,
        monkeypatch,
        [row],
        [
            {
                **row,
                "query_id": "b",
                "question": "How many?",
                "answers_spans": {"spans": ["2", "two"], "types": ["number", "span"]},
            }
        ],
    )
    (task,), (held_out,) = load_tasks("drop", path=path), load_tasks("drop", "eval", path=path)
    assert task.answer == [["Cats", "dogs"]] and scores("dogs | cats", task) == (1.0, 1.0)
    assert held_out.answer == [["2"], ["two"]] and scores("2.0", held_out) == (1.0, 1.0)


def test_drop_as_its_authors_give_it(tmp_path, monkeypatch) -> None:
    date = {"day": "3", "month": "March", "year": "1992"}
    none = {"day": "", "month": "", "year": ""}
    first = {"number": "", "date": date, "spans": []}
    validated = {"number": ["", ""], "date": [none, date], "spans": [["March 1992"], []]}
    row = {
        "query_id": "a",
        "passage": "P.",
        "question": "When?",
        "answer": first,
        "validated_answers": validated,
    }
    other = {
        **row,
        "query_id": "b",
        "question": "How many?",
        "answer": {"number": "4", "date": none, "spans": []},
    }
    path = copy(tmp_path, monkeypatch, [row], [other])
    (task,) = load_tasks("drop", path=path)
    assert task.answer == [["3 March 1992"], ["March 1992"]] and "put | between" in task.prompt
    assert load_tasks("drop", "eval", path=path)[0].answer[0] == ["4"]


def test_rows_of_another_kind_are_refused(tmp_path, monkeypatch) -> None:
    path = copy(tmp_path, monkeypatch, [{"prompt": "?"}], [{"prompt": "?"}])
    with pytest.raises(SettingError, match="tasks 'drop': no column 'passage'"):
        load_tasks("drop", path=path)
    with pytest.raises(SettingError, match="tasks 'hotpotqa': no column 'question'"):
        load_tasks("hotpotqa", path=path)
