"""GEPA through its own library on a scripted team: what evolves and what its control does not find,
what the reflector is shown, the record that makes a resumed run the same, and the budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.trainers.errors import RunError
from marlora.trainers.methods.prompts.search.gepa_adapter import Record
from marlora.trainers.methods.prompts.search.gepa_prompts import GEPAConfig, GEPATrainer
from tests.trainers.methods.prompts.search.gepa_run import blind, team, trainer
from tests.trainers.methods.prompts.search.search_runs import (
    end,
    evaluated,
    on_two_ranks,
    summary_of,
)
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> GEPATrainer:
    """A run that nothing cut off."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    return made


def test_prompts_evolve_and_the_best_is_in_force(whole: GEPATrainer) -> None:
    summary = summary_of(whole)
    accuracy = {when: summary["eval"][when]["accuracy"] for when in ("before", "after")}
    assert accuracy["before"] == 0.2 < 0.5 < accuracy["after"]
    best = max(whole.search.candidates, key=lambda candidate: candidate.mean)
    assert whole.run.values == best.values and whole.search.current is not None
    assert whole.search.current.id == best.id
    scores = [row["gepa"]["best_score"] for row in rows(whole.args.folder)]
    assert scores == sorted(scores) and scores[0] < scores[-1] and len(scores) == 13


def test_a_child_is_its_parent_with_one_prompt_rewritten(whole: GEPATrainer) -> None:
    """The agents take turns; who was made from whom stands in the archive."""
    for candidate in whole.search.candidates[1:]:
        (parent,) = (whole.search[id] for id in candidate.parents)
        differ = [n for n in candidate.values if candidate.values[n] != parent.values[n]]
        assert len(differ) == 1
    asked = [e.task.id.partition("/")[0] for e in whole.run.rollouts.store.read(kind="aside")]
    assert set(asked) == {"a.prompt", "b.prompt"} and asked.count("a.prompt") >= 3


def test_the_pareto_front_is_reported(whole: GEPATrainer) -> None:
    """Nobody knows all kinds, so several candidates are best on some task."""
    front = summary_of(whole)["pareto_front"]
    assert len(front) > 1 and [row["score"] for row in front] == sorted(
        (row["score"] for row in front), reverse=True
    )
    assert all(row["best_on"] >= 1 for row in front)
    page = (whole.args.folder / "report.html").read_text(encoding="utf-8")
    for row in front:
        assert f"Pareto front: best on {row['best_on']} of 20 tasks" in page
    others = {c.id for c in whole.search.candidates} - {row["id"] for row in front}
    assert all(whole.search[id].verdict == "dominated" for id in others)


def test_the_reflector_is_shown_the_turns_of_one_agent(whole: GEPATrainer) -> None:
    asked = list(whole.run.rollouts.store.read(kind="aside"))
    assert asked and len(asked) == summary_of(whole)["gepa"]["asked"]
    train = {task.id.split()[1] for task in whole.spec.tasks}
    for episode in asked:
        (turn,) = episode.turns
        text = turn.messages[-1].content
        agent = episode.task.id.partition(".")[0]
        assert f"Write a new instruction for agent {agent}." in text and turn.saw_gold
        assert text.count("<EXAMPLE>") == 4 and "The right answer is: yes" in text
        inputs = [part.partition("\n</INPUT>")[0] for part in text.split("<INPUT>\n")[1:]]
        # `a` reads the task, `b` what `a` said of it
        assert all(("|" in each) == (agent == "b") for each in inputs)
        assert {each.split()[2].partition("|")[0] for each in inputs} <= train, "no validation task"


@pytest.mark.slow
def test_a_reflector_that_does_not_look_finds_nothing(model: Path, tmp_path: Path) -> None:
    """The control: as many proposals, none of which names a kind."""
    made = trainer(tmp_path / "run", model, say=blind)
    summary = made.train()
    assert summary["gepa"]["asked"] >= 10 and made.run.values == {}
    assert summary["eval"]["after"]["accuracy"] == summary["eval"]["before"]["accuracy"]


# the record


@pytest.mark.parametrize(
    "share",
    [0.3, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)],
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    share: float, whole: GEPATrainer, model: Path, tmp_path: Path
) -> None:
    """The library swallows what its adapter raises; the run ends all the same, and what was scored
    and asked before is not played again."""
    call = int(share * summary_of(whole)["budget"]["spent"]["calls"])
    broken = ScriptedEngine(
        team, faults={call: Fault("raise", error=EngineError("gone"))}, context=16_384
    )
    with pytest.raises(EngineError, match="gone"):
        trainer(tmp_path / "cut", model, engine=broken).train()
    again = trainer(tmp_path / "cut", model, resume=True)
    again.train()
    assert end(again) == end(whole)
    ids = [sorted(e.id for e in made.run.rollouts.store) for made in (again, whole)]
    assert ids[0] == ids[1], "nothing is played or asked twice"


def test_every_step_runs_the_library_again_and_plays_nothing_twice(whole: GEPATrainer) -> None:
    calls = whole.memory["calls"]
    assert len(calls) == sum(row["gepa"]["calls"] for row in rows(whole.args.folder))
    played = [e for e in whole.run.rollouts.store.read(kind="trial") if e.parent is None]
    ids = [(e.task.id, e.state.key) for e in played]
    assert len(ids) == len(set(ids))
    assert not list(whole.args.folder.rglob("*.bin")) + list(whole.args.folder.rglob("*.pkl"))


def test_a_record_of_other_settings_is_refused(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, num_proposals=1)
    made.train()
    with pytest.raises(RunError, match="gepa: question 2 is another than the one on record"):
        trainer(
            tmp_path / "run", model, num_proposals=2, resume=True, reflection_minibatch_size=5
        ).train()


def test_answers_come_from_the_record_while_there_are_some() -> None:
    record = Record([])
    assert record.answer(["a"], lambda: 1) == 1 and record.answer(["b"], lambda: 2) == 2
    again = Record(list(record.calls))
    assert again.answer(["a"], lambda: 3) == 1 and again.place == 1
    with pytest.raises(RunError, match="question 2"):
        again.answer(["c"], lambda: 4)
    assert again.answer(["b"], lambda: 5) == 2 and again.answer(["d"], lambda: 6) == 6
    assert [call["answer"] for call in again.calls] == [1, 2, 6]


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_find_what_one_finds(whole: GEPATrainer, tmp_path: Path) -> None:
    """In processes with hashes of their own."""
    first, second = on_two_ranks("tests.trainers.methods.prompts.search.gepa_run", whole, tmp_path)
    assert first == second == end(whole)


@pytest.mark.parametrize("share", [0.4, pytest.param(0.8, marks=pytest.mark.slow)])
def test_the_runs_budget_is_never_exceeded(
    share: float, whole: GEPATrainer, model: Path, tmp_path: Path
) -> None:
    """Not by a single call, where the library finishes what it has begun."""
    limit = int(share * summary_of(whole)["budget"]["spent"]["calls"])
    made = trainer(tmp_path / "run", model, budget={"calls": limit})
    summary = made.train()
    assert summary["budget"]["stopped"] and summary["budget"]["spent"]["calls"] <= limit
    assert 0 < summary["steps"] < 13 and summary["done"] == "the budget is spent"
    assert made.search.current is not None
    assert {**made.run.values} in ({}, dict(made.search.current.values))


def test_a_checkpoint_is_worth_what_the_run_said(
    whole: GEPATrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(whole, team, 13, tmp_path, monkeypatch)


def cut_off(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """A reflector that never closes its tag."""
    said = team(prompt, ref, sampling, k)
    return said.removesuffix("</INSTRUCTION>") if "INSTRUCTION>" in said else said


def test_a_reflector_without_a_usable_instruction_changes_nothing(
    model: Path, tmp_path: Path
) -> None:
    """Dropped, counted, and no run of the team is spent on it."""
    made = trainer(tmp_path / "run", model, say=cut_off, num_proposals=3)
    summary = made.train()
    assert summary["gepa"]["dropped"] == {"truncated": 3} and summary["gepa"]["candidates"] == 1
    assert made.run.values == {} and summary["steps"] == 4


def test_all_prompts_may_be_rewritten_at_once_and_some_left_out(
    model: Path, tmp_path: Path
) -> None:
    made = trainer(
        tmp_path / "all", model, component_selection="all", num_proposals=1, num_eval_tasks=5
    )
    made.train()
    asked = [e.task.id for e in made.run.rollouts.store.read(kind="aside")]
    assert [name.partition("/")[0] for name in asked] == ["a.prompt", "b.prompt"]
    made = trainer(tmp_path / "one", model, modules=["b"], num_proposals=2, num_eval_tasks=5)
    made.train()
    assert {tuple(c.values) for c in made.search.candidates} == {("b.prompt",)}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"helpers": {}}, "helpers.reflector: missing"),
        ({"modules": ["c"]}, "modules: no agent 'c'"),
        ({"num_val_tasks": 0}, "num_val_tasks: expected at least 1"),
        ({"num_proposals": 0}, "num_proposals: expected at least 1"),
        ({"max_steps": 5}, "max_steps: a step is a proposal and there are 12 after the first"),
        ({"reflection_minibatch_size": 41}, "reflection_minibatch_size: 41 tasks of 40"),
        ({"candidate_selection": "best"}, "candidate_selection: expected one of pareto"),
        ({"episodes": "x"}, "episodes: this method plays its runs itself"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


def test_without_gepa_the_run_does_not_begin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gepa", None)
    with pytest.raises(SettingError, match=r"pip install 'marlora\[gepa\]'"):
        trainer(tmp_path / "run", model)


def test_steps_follow_from_the_proposals() -> None:
    config = GEPAConfig(model="m")
    assert (config.num_proposals, config.max_steps) == (20, 21)
    assert (config.reflection_minibatch_size, config.candidate_selection) == (3, "pareto")
