"""Question answering over texts: HotpotQA and DROP as tasks; `rewards/qa.py` scores them.

An answer is a list of alternatives. HotpotQA's are texts. DROP's are lists of spans, for an answer
can have several parts; a team's output is cut at `|`, as the prompt asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...agents.types import SettingError, Task
from .datasets import own_split, rows_of


def hotpotqa(
    *, split: str, seed: int, path: str = "hotpotqa/hotpot_qa", config: str = "distractor"
) -> Iterator[Task]:
    """HotpotQA (arXiv:1809.09600): questions over ten paragraphs; own splits. `path`: hub name, or
    a local folder."""
    return own_split(
        "hotpotqa",
        rows_of("hotpotqa", path, split, config),
        seed,
        lambda _, rows: map(_over_paragraphs, rows),
    )


def drop(*, split: str, seed: int, path: str = "ucinlp/drop") -> Iterator[Task]:
    """DROP (arXiv:1903.00161): questions that ask for sums, counts and comparisons over a passage;
    own splits. `path`: hub name, or folder.

    Rows as of `ucinlp/drop` (`answers_spans`: of training rows one annotator's spans, of the others
    one span per annotator, for there the set does not tell several spans from several annotators),
    or as the authors give them (`answer`, `validated_answers`).
    """
    rows = rows_of("drop", path, split, None)
    return own_split(
        "drop", rows, seed, lambda part, rows: (_over_passage(row, part) for row in rows)
    )


def _over_paragraphs(row: Mapping[str, Any]) -> Task:
    _expect("hotpotqa", row, "question", "answer", "context")
    context = row["context"]
    pairs = (
        zip(context["title"], context["sentences"], strict=True)
        if isinstance(context, Mapping)
        else context
    )  # the hub's rows, the authors'
    texts = "\n\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in pairs)
    meta = {"_scorer": "hotpotqa", "_type": row.get("type", ""), "_level": row.get("level", "")}
    key = str(row.get("id") or row.get("_id"))
    return Task(
        key, f"{texts}\n\nQuestion: {row['question']}", [str(row["answer"])], "hotpotqa", meta=meta
    )


def _over_passage(row: Mapping[str, Any], split: str) -> Task:
    _expect("drop", row, "passage", "question")
    if "answers_spans" in row:
        spans = [str(span) for span in row["answers_spans"]["spans"]]
        answers = [spans] if split == "train" else [[span] for span in spans]
    else:
        _expect("drop", row, "answer")
        answers = [
            _spans(each)
            for each in (row["answer"], *_validated(row.get("validated_answers") or ()))
        ]
    answers = [list(each) for each in dict.fromkeys(map(tuple, answers)) if each]
    if not answers:
        raise SettingError(f"tasks 'drop', {row.get('query_id')}: no answer in the row")
    prompt = (
        f"{row['passage']}\n\nQuestion: {row['question']}\nIf the answer has several parts, put |"
        " between them."
    )
    return Task(str(row.get("query_id")), prompt, answers, "drop", meta={"_scorer": "drop"})


def _expect(name: str, row: Mapping[str, Any], *columns: str) -> None:
    if missing := [c for c in columns if c not in row]:
        raise SettingError(
            f"tasks {name!r}: no column {missing[0]!r}; found {sorted(row)}, expected"
            f" {', '.join(columns)}"
        )


def _validated(given: Any) -> Iterable[Mapping[str, Any]]:
    """A list of answers, or (as Parquet has it) lists by key."""
    if not isinstance(given, Mapping):
        return given
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _spans(answer: Mapping[str, Any]) -> list[str]:
    if answer.get("number") not in (None, ""):
        return [str(answer["number"])]
    date = " ".join(
        str((answer.get("date") or {}).get(part) or "") for part in ("day", "month", "year")
    ).split()
    return [str(span) for span in answer.get("spans") or ()] or ([" ".join(date)] if date else [])
