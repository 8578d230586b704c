"""metaTextGrad's runs: an optimizer whose own prompt decides whether it learns, and compositions of
optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.text_feedback.meta_optimizers import margin
from marlora.trainers.methods.text_feedback.metatextgrad import (
    TRIED,
    MetaTextGradConfig,
    MetaTextGradTrainer,
)
from marlora.trainers.methods.text_feedback.textual_gradient import TEXTUAL_GRADIENT
from tests.trainers.feedback_run import CHAT, criticise, rewrite, solve, trainer
from tests.trainers.loop.test_state import facts
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
MARKER = "Say what the signs mean."
SAMPLING = {"temperature": 0, "max_tokens": 900}
HELPERS: dict[str, Any] = {
    "meta": {"prompt": "I am meta", "sampling": SAMPLING},
    "backward": {"prompt": "I am backward", "sampling": SAMPLING},
    "optimizer": {"sampling": SAMPLING},
}


def fits(question: str) -> str:
    """A `meta` that puts the marker into the prompt that it is shown, and composes in turn."""
    if "Compose them" in question:
        return 'So: {"pipeline": ["rewrite", "textgrad"]}'
    value = question.partition("<VARIABLE>\n")[2].partition("\n</VARIABLE>")[0]
    return f"<IMPROVED_VARIABLE>{MARKER} {value}</IMPROVED_VARIABLE>"


def in_turn(*replies: str) -> Callable[[str], str]:
    left = list(replies)
    return lambda question: left.pop(0)


def value(text: str) -> str:
    return f"<IMPROVED_VARIABLE>{text}</IMPROVED_VARIABLE>"


def says(meta: Callable[[str], str] = fits) -> Any:
    """The engine's answers: the optimizer looks at the feedback only if its prompt says so."""
    words = 0

    def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        nonlocal words
        messages = CHAT.findall(prompt)
        system = next((text for role, text in messages if role == "system"), "")
        user = [text for role, text in messages if role == "user"][-1]
        if system.startswith("I am meta"):
            return meta(user)
        if system.startswith("I am backward"):
            return criticise(user)
        if MARKER in system:
            return rewrite(user)
        if "optimizer" in system:
            words += 1
            return value(f"Word {words}.")
        return solve(system, user)

    return answer


def meta(folder: Path, model: Path, **changes: Any) -> MetaTextGradTrainer:
    settings: dict[str, Any] = dict(
        say=says(),
        helpers=HELPERS,
        num_val_tasks=10,
        tasks_per_step=4,
        max_steps=1,
        prompt_trials=1,
        inner_steps=2,
    )
    made: MetaTextGradTrainer = trainer(
        folder, model, cls=MetaTextGradTrainer, config=MetaTextGradConfig, **{**settings, **changes}
    )
    return made


def meta_rows(folder: Path) -> list[dict[str, Any]]:
    return [row["meta"] for row in rows(folder)]


def test_a_better_prompt_of_the_optimizer_is_found_by_what_it_makes_of_the_team(
    model: Path, tmp_path: Path
) -> None:
    """The sheet's script: the start's inner run learns nothing, the first trial's all; the run ends
    with the team of that inner run, and its checkpoint holds the optimizer."""
    made = meta(tmp_path / "run", model)
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    assert summary["done"] == TRIED and "@ means plus." in made.run.values["solver.prompt"]
    start, trial = made.search.candidates
    assert (start.mean, trial.mean) == (0, 1) and trial.adopted
    found = summary["optimizer"]["prompts"]["textgrad"]
    assert found["rewrite_system"].startswith(MARKER)
    assert {n: t for n, t in found.items() if n != "rewrite_system"} == {
        n: t for n, t in TEXTUAL_GRADIENT.items() if n != "rewrite_system"
    }
    assert summary["optimizer"]["margin"] == pytest.approx(margin(2, 10))
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "trainer" / "parts" / "optimizers"
    (file,) = saved.iterdir()
    assert MARKER in file.read_text(encoding="utf-8")
    # recorded and metered: the helpers of inner runs beside meta
    calls = {name: row["calls"] for name, row in summary["ledger"]["aside"].items()}
    assert calls["meta"] == 1 and calls["optimizer"] == 4 and calls["backward"] >= 8
    held_out = {task.id for task in made.spec.eval_tasks}
    played = [e for e in Store(tmp_path / "run" / "episodes") if e.kind != "eval"]
    assert not held_out & {e.task.id for e in played}, "no method sees held-out tasks"
    asked = next(e for e in played if e.task.id.startswith("meta/"))
    assert asked.task.prompt.count("<QUESTION>") == asked.task.prompt.count("<ANSWER>") == 4
    assert "score 0.0000" in asked.task.prompt, "the start and its score are the history"


@pytest.mark.slow
def test_forward_calls_of_nested_runs(model: Path, tmp_path: Path) -> None:
    """Fact U2: J = 3, I = 2, b = 4, n = 10: (3 + 1) * 2 * (4 + 10) = 112 if each inner run plays all
    anew. Recalled here are the first batch of the three later runs (3 * 4); the start is measured
    besides (10)."""
    replies = [value(f"Trial {n}, optimizer.") for n in range(3)]
    made = meta(
        tmp_path / "run",
        model,
        say=says(in_turn(*replies)),
        max_steps=3,
        prompt_trials=3,
        gate="not_worse",
    )
    ledger = made.train()["ledger"]
    forward = sum(ledger[kind]["solver"]["calls"] for kind in ("train", "trial"))
    assert forward == 112 - 3 * 4 + 10 == 110
    assert len(made.inner["runs"]) == 4
    stages = [row["stage"] for row in meta_rows(tmp_path / "run")]
    assert stages == ["textgrad"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("score", "adopted"), [(0.5, False), (0.51, True)])
def test_the_gate_of_prompts_is_strict(
    score: float, adopted: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fact U1: best .50; .50 keeps the old one, .51 replaces it."""
    made = meta(tmp_path / "run", model, num_val_tasks=1, max_steps=1)
    scores = [0.5, score]

    def scored(candidate: Any) -> Any:
        run = {"optimizer": candidate.id, "values": {}}
        made.inner["runs"] = [*made.inner["runs"], run]
        return made.search.score(candidate.id, dict.fromkeys(made.val_ids, scores.pop(0)))

    monkeypatch.setattr(made, "_score", scored)
    made.train()
    (row,) = meta_rows(tmp_path / "run")
    start, new = made.search.candidates
    assert row["adopted"] == bool(new.adopted) == adopted
    assert row["best"] == (new if adopted else start).id


@pytest.mark.slow
def test_compositions_start_from_the_best_optimizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fact U3: scores A .4, B .6, C .5 start from B."""
    made = meta(
        tmp_path / "run",
        model,
        optimizers=["textgrad", "revolve", "rewrite"],
        prompt_trials=0,
        num_val_tasks=1,
    )
    worth = {"textgrad": 0.4, "revolve": 0.6, "rewrite": 0.5}

    def scored(candidate: Any) -> Any:
        pipeline = candidate.values["pipeline"]
        score = worth[pipeline[0]] if len(pipeline) == 1 else 0.55
        run = {"optimizer": candidate.id, "values": {}}
        made.inner["runs"] = [*made.inner["runs"], run]
        return made.search.score(candidate.id, dict.fromkeys(made.val_ids, score))

    monkeypatch.setattr(made, "_score", scored)
    made.train()
    *starts, composed = made.search.candidates
    assert [c.values["pipeline"] for c in starts] == [["textgrad"], ["revolve"], ["rewrite"]]
    assert composed.values["pipeline"] == ["rewrite", "textgrad"]
    assert composed.parents == (starts[1].id,) and not composed.adopted
    (row,) = meta_rows(tmp_path / "run")
    assert row["stage"] == "composed" and row["best"] == starts[1].id


@pytest.mark.slow
def test_a_composition_is_run_in_turn(model: Path, tmp_path: Path) -> None:
    """The sheet's script for the second stage: a JSON list of optimizers, each with its best
    prompts."""
    made = meta(
        tmp_path / "run", model, optimizers=["rewrite", "textgrad"], max_steps=3, num_val_tasks=9
    )
    made.train()
    *_, composed = made.search.candidates
    (run,) = [r for r in made.inner["runs"] if r["optimizer"] == composed.id]
    assert [step["optimizer"] for step in run["steps"]] == ["rewrite", "textgrad"]
    assert MARKER in composed.values["prompts"]["textgrad"]["rewrite_system"]
    assert [row["stage"] for row in meta_rows(tmp_path / "run")] == [
        "rewrite",
        "textgrad",
        "composed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (value("Improve {valeu}."), "expected the fields"),
        (value("An open { brace."), "unpaired '{'"),
        ("import os; os.system('true')", ""),
        ("no tags at all", ""),
    ],
)
def test_an_optimizer_that_cannot_work_is_recorded_and_the_run_goes_on(
    reply: str, fault: str, model: Path, tmp_path: Path
) -> None:
    """Fact U5: it is lost, which no score is worse than; code is not an optimizer at all."""
    made = meta(
        tmp_path / "run",
        model,
        say=says(in_turn(reply, fits("<VARIABLE>\nBe an optimizer.\n</VARIABLE>"))),
        max_steps=2,
        prompt_trials=2,
    )
    summary = made.train()
    first, second = meta_rows(tmp_path / "run")
    assert not first["adopted"] and second["adopted"] and summary["eval"]["after"]["accuracy"] == 1
    lost = [c for c in made.search.candidates if c.fault]
    assert (fault in lost[0].fault) if fault else not lost
    assert first["unreadable"] == (not fault) and len(made.inner["runs"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        '{"pipeline": ["textgrad", "adas"]}',
        '{"pipeline": []}',
        '{"pipeline": ["textgrad", "textgrad", "textgrad"]}',
        '{"pipeline": "import os"}',
    ],
)
def test_compositions_of_what_there_is_not_are_lost(
    reply: str, model: Path, tmp_path: Path
) -> None:
    made = meta(
        tmp_path / "run",
        model,
        say=says(in_turn(reply)),
        optimizers=["textgrad", "rewrite"],
        prompt_trials=0,
        inner_steps=2,
    )
    made.train()
    *_, lost = made.search.candidates
    assert lost.fault and len(made.inner["runs"]) == 2


def test_margins_of_the_best_of_several_scores() -> None:
    """Fact U4: 300 tasks for 10 candidates, 185 for one, at .10 and 95 %."""
    assert margin(10, 300) <= 0.1 < margin(10, 299)
    assert margin(1, 185) <= 0.1 < margin(1, 184)


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("ask", [5, 7])
def test_a_run_that_is_killed_inside_an_inner_run_comes_to_the_same(
    ask: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same optimizer and seed give the same trajectory (fact U6); nothing is asked or counted
    twice, the nested bound of tokens included."""
    from marlora.trainers.feedback.helpers import Helpers

    whole = meta(tmp_path / "whole", model, inner_tokens=6000)
    whole.train()
    original, rounds = Helpers.ask, 0

    def dies(self: Helpers, questions: Any) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds == ask:
            original(self, questions[: (len(questions) + 1) // 2])
            raise Cut
        return original(self, questions)

    monkeypatch.setattr(Helpers, "ask", dies)
    with pytest.raises(Cut):
        meta(tmp_path / "cut", model, inner_tokens=6000).train()
    monkeypatch.setattr(Helpers, "ask", original)
    again = meta(tmp_path / "cut", model, inner_tokens=6000, resume=True)
    again.train()
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")
    assert again.inner["runs"] == whole.inner["runs"]
    hashes = [run["trajectory"] for run in whole.inner["runs"]]
    assert len(set(hashes)) == 2


@pytest.mark.slow
def test_budgets_nest(model: Path, tmp_path: Path) -> None:
    """An inner run that has come to its share takes no further step; the run's budget is asked
    before every call of an inner run, and the run ends whole."""
    made = meta(tmp_path / "short", model, inner_tokens=1)
    made.train()
    assert [len(run["steps"]) for run in made.inner["runs"]] == [1, 1]
    assert all(run["tokens"] > 1 for run in made.inner["runs"])
    limit = made.inner["runs"][0]["tokens"] + 300  # in the middle of the second inner run
    summary = meta(tmp_path / "cut", model, budget={"tokens": limit}).train()
    assert summary["budget"]["spent"]["tokens"] <= limit
    assert summary["done"] == "the budget is spent" and summary["steps"] == 0
    assert summary["eval"]["after"]["accuracy"] == 0 and "optimizer" not in summary


@pytest.mark.slow
def test_a_control_without_the_prompt_of_the_optimizer_learns_nothing(
    model: Path, tmp_path: Path
) -> None:
    """As many trials, and `meta` says prompts that fit no task."""
    made = meta(tmp_path / "run", model, say=says(in_turn(value("Work well, optimizer."))))
    assert made.train()["eval"]["after"]["accuracy"] == 0
    (row,) = meta_rows(tmp_path / "run")
    assert not row["adopted"] and row["verdict"].startswith("not better: 0.0000 against 0.0000")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizers": ["adas"]}, "optimizers: expected one of"),
        ({"optimizers": ["textgrad", "textgrad"]}, "optimizers: expected different names"),
        ({"optimized": ["rewrit"]}, "optimized: expected one of"),
        ({"num_val_tasks": 0, "gate": "always"}, "num_val_tasks: optimizers are compared"),
        ({"helpers": {**HELPERS, "meta": {}, "optimizer": {"prompt": "x"}}}, "helpers.optimizer"),
        ({"helpers": {n: HELPERS[n] for n in ("backward", "optimizer")}}, "helpers.meta: missing"),
        ({"helpers": {"meta": {}, "optimizer": {}}}, "helpers.backward: missing"),
        ({"prompts": {"meta": "x"}}, "prompts.meta: this method has no such prompt"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        meta(tmp_path / "run", model, **settings)
    assert words in str(refused.value) and "\n" not in str(refused.value)
