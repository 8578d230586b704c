"""LLM-AutoDiff's runs: what a step learns from, its proposals, its two gates and its history; what
all methods have to do stands in `test_learning.py` and `test_alike.py`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.text.tags import inside
from marlora.agents.types import SettingError
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.text_feedback.llm_autodiff import (
    LLMAutoDiffConfig,
    newest,
    subset,
    task_scores,
)
from tests.trainers.feedback_cases import chain_of
from tests.trainers.feedback_run import SIGNS, run_of, scripted
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD = " ".join(f"{sign} means {name}." for sign, name in SIGNS.items())


def in_turn(*values: str) -> Callable[[str], str]:
    """An optimizer that says these values, one per call; then useless ones."""
    count, left = 0, list(values)

    def optimizer(question: str) -> str:
        nonlocal count
        count += 1
        value = left.pop(0) if left else f"useless {count}"
        return f"<METHOD>way {count}</METHOD><IMPROVED_VARIABLE>{value}</IMPROVED_VARIABLE>"

    return optimizer


def optimizer_prompts(folder: Path) -> list[str]:
    asked = [e for e in Store(folder / "episodes") if e.task.id.startswith("optimizer")]
    return [e.task.prompt for e in sorted(asked, key=lambda e: (e.step, e.task.id))]


@pytest.mark.parametrize(
    ("errors", "correct", "sizes"),
    [(0, 8, (0, 2)), (1, 7, (1, 2)), (2, 6, (2, 2)), (5, 1, (2, 1)), (4, 0, (2, 0))],
)
def test_sizes_of_what_a_step_learns_from(
    errors: int, correct: int, sizes: tuple[int, int]
) -> None:
    """Fact U1; at a score of .5 a task is an error."""
    scores = {f"e{n}": 0.5 for n in range(errors)} | {f"c{n}": 0.6 for n in range(correct)}
    draws = [subset(scores, LLMAutoDiffConfig(), random.Random(seed)) for seed in range(9)]
    for chosen in draws:
        assert len(set(chosen)) == len(chosen)
        assert (sum(i[0] == "e" for i in chosen), sum(i[0] == "c" for i in chosen)) == sizes
    assert len({tuple(chosen) for chosen in draws}) > 1 or errors + correct <= sum(sizes)


def test_what_the_moving_batch_keeps() -> None:
    """All up to its size; then the newest, with `min_errors` of the newest errors among them."""
    args = LLMAutoDiffConfig(moving_batch=4, min_errors=2)
    scores = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 1.0, "f": 1.0, "g": 1.0}
    assert newest(list("abd"), scores, args) == list("abd")
    assert newest(list("abcdefg"), scores, args) == list("bcfg")
    assert newest(list("defgabc"), scores, args) == list("gabc"), "the newest hold them anyway"
    assert newest(list("defg"), {}, args) == list("defg"), "what has no score is no error"
    one = LLMAutoDiffConfig(moving_batch=1, min_errors=2)
    assert newest(list("abcdefg"), scores, one) == ["c"]
    assert newest(list("abd"), scores, LLMAutoDiffConfig(moving_batch=2, min_errors=0)) == [
        "b",
        "d",
    ]


def test_scores_of_tasks() -> None:
    episodes = [chain_of("t", "a", score=0), chain_of("t", "a", score=1), chain_of("u", "a")]
    episodes += [chain_of("failed", "a", error="no"), chain_of("nan", "a", score=float("nan"))]
    assert task_scores(episodes, "right") == {"t": 0.5, "u": 0.0, "failed": 0.0}


def test_the_script_of_the_sheet(model: Path, tmp_path: Path) -> None:
    """Two useless proposals, then the rule: two failed, one accepted, whose score is that on the
    validation tasks; the moving batch is empty. The failed ones are shown by their method alone."""
    say = scripted(optimizer=in_turn("useless a", "useless b", GOOD))
    made = run_of("llm_autodiff", tmp_path / "run", model, say=say, max_steps=1)
    summary = made.train()
    updates = made.feedback.history.updates
    assert [u["status"] for u in updates] == ["rejected", "rejected", "adopted"]
    assert [u["score"] for u in updates] == [None, None, 1.0]
    assert made.moving["tasks"] == [] and made.moving["steps_without_success"] == 0
    assert summary["eval"]["after"]["accuracy"] == 1
    first, second, third = optimizer_prompts(tmp_path / "run")
    assert "<FAILED>" not in first and "way 1" in second and third.count("<FAILED>") == 2
    assert not any("useless" in text for text in (second, third)), "values are hidden"
    val = {task.id for task in made.spec.val_tasks}
    trials = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "trial"]
    played = Counter(
        (e.state.values.get("solver.prompt"), e.task.id in val) for e in trials if e.task.id
    )
    on_two = {(value, False): 2 for value in (None, "useless a", "useless b", GOOD)}
    assert played == {**on_two, (None, True): 9, (GOOD, True): 9}, "failed ones on the subset alone"


def test_a_step_without_success_keeps_its_tasks(model: Path, tmp_path: Path) -> None:
    """Five proposals fail: the values stay, the errors are kept, and what is played again costs
    nothing; at the next success the batch is empty again. The optimizer is shown for how long."""
    say = scripted(optimizer=in_turn(*[f"useless {c}" for c in "abcdefghij"], GOOD))
    made = run_of("llm_autodiff", tmp_path / "run", model, say=say, max_steps=3)
    summary = made.train()
    own = [row["llm_autodiff"] for row in rows(tmp_path / "run")]
    assert [each["kept"] for each in own] == [4, 8, 0]
    assert [each["chosen"] for each in own] == [2, 2, 2], "two errors, none is right yet"
    assert summary["ledger"]["train"]["solver"]["calls"] == 12, "four new tasks a step"
    assert len(made.feedback.history.updates) == 11 and summary["eval"]["after"]["accuracy"] == 1
    texts = optimizer_prompts(tmp_path / "run")
    shown = [
        inside(text.partition("The new value has")[0], "STEPS_WITHOUT_SUCCESS") for text in texts
    ]
    assert shown == [None] * 5 + ["1."] * 5 + ["2."]
    assert texts[-1].count("<FAILED>") == 5, "the last five"
    assert summary["ledger"]["aside"]["backward"]["calls"] == 3 * 4, "once a step"


@pytest.mark.slow
def test_after_three_steps_without_success_it_is_asked_to_be_bolder(
    model: Path, tmp_path: Path
) -> None:
    say = scripted(optimizer=in_turn())
    run_of("llm_autodiff", tmp_path / "run", model, say=say, max_steps=5, num_proposals=1).train()
    bold = ["Be bolder" in text for text in optimizer_prompts(tmp_path / "run")]
    assert bold == [False] * 4 + [True], "4 is the first number above 3"


@pytest.mark.slow
def test_the_best_values_are_shown_with_their_scores(model: Path, tmp_path: Path) -> None:
    values = (GOOD.replace("# means times.", ""), GOOD)
    say = scripted(optimizer=in_turn(*values))
    made = run_of("llm_autodiff", tmp_path / "run", model, say=say, max_steps=3, num_proposals=1)
    made.train()
    updates = made.feedback.history.updates
    assert [u["status"] for u in updates][:2] == ["adopted", "adopted"]
    last = optimizer_prompts(tmp_path / "run")[-1]
    first, second = (last.index(f"score {u['score']:.4f}: ") for u in (updates[1], updates[0]))
    assert first < second and updates[1]["score"] == 1.0


@pytest.mark.slow
def test_good_outputs_cost_no_call_of_backward(model: Path, tmp_path: Path) -> None:
    """All are right: canned feedback alone. The first gate passes an equal perfect score, the second
    does not."""
    made = run_of(
        "llm_autodiff",
        tmp_path / "run",
        model,
        values={"solver.prompt": GOOD},
        say=scripted(optimizer=in_turn(GOOD + " Please.")),
        max_steps=1,
        num_proposals=1,
    )
    summary = made.train()
    assert set(summary["ledger"]["aside"]) == {"optimizer"}
    (update,) = made.feedback.history.updates
    assert update["status"] == "rejected" and update["why"].startswith("full set: ")
    assert made.run.values == {"solver.prompt": GOOD}
    (text,) = optimizer_prompts(tmp_path / "run")
    assert text.count("No noticeable error.") == 2 and text.count(", score 1\n") == 2


@pytest.mark.slow
def test_a_whole_batch(model: Path, tmp_path: Path) -> None:
    """Their "random" strategy: no moving batch, and feedback on every task of the step."""
    say = scripted(optimizer=in_turn())
    made = run_of("llm_autodiff", tmp_path / "run", model, say=say, batches="whole", max_steps=2)
    summary = made.train()
    assert [row["llm_autodiff"] for row in rows(tmp_path / "run")] == [{"kept": 0, "chosen": 4}] * 2
    assert summary["ledger"]["aside"]["backward"]["calls"] == 2 * 8


def test_a_reply_without_tags_changes_nothing(model: Path, tmp_path: Path) -> None:
    """Upstream the whole reply becomes the value (issue 246). All five of a step are counted."""
    say = scripted(optimizer=lambda q: f"<METHOD>I replace it</METHOD> {GOOD}")
    made = run_of("llm_autodiff", tmp_path / "run", model, say=say, max_steps=1)
    made.train()
    (row,) = rows(tmp_path / "run")
    assert row["text_feedback"]["unreadable"] == row["text_feedback"]["proposals"] == 5
    assert made.run.values == {} and made.feedback.history.updates == []
    assert len(made.moving["tasks"]) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_val_tasks": 0}, "gate: strictly_better compares values on validation tasks"),
        ({"num_val_tasks": 0, "gate": "always"}, "num_val_tasks: 0, but the second stage"),
        ({"first_gate": "better"}, "first_gate: expected one of"),
        ({"batches": "all"}, "batches: expected one of moving, whole"),
        ({"max_errors": 0}, "max_errors: expected"),
        ({"num_proposals": 0}, "num_proposals: expected"),
        ({"helpers": {"optimizer": {}}}, "helpers.backward: missing"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        run_of("llm_autodiff", tmp_path / "run", model, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)
