"""Rounds of prompt candidates, on an engine that says the digit of its prompt: ranks, gates,
proposals, kills and the budget."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.prompts.prompts_and_weights import PromptsAndWeightsTrainer
from tests.trainers.methods.prompts.prompts_and_weights_run import Cut, digit, rows_of, said, search

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptsAndWeightsTrainer:
    made = search(tmp_path_factory.mktemp("found") / "run", model)
    made.train()
    return made


def test_prompts_evolve_from_the_rollouts_and_pass_the_gate(
    found: PromptsAndWeightsTrainer,
) -> None:
    rows = [row["prompts"] for row in rows_of(found.args.folder)]
    assert [row["reward"] for row in rows] == [
        {"0": 0.0},
        {"1": 1 / 3, "0": 0.0},
        {"2": 2 / 3, "1": 1 / 3},  # the worst made room
        {"3": 1.0, "2": 2 / 3},
    ]
    assert [row.get("gate", {}).get("candidate") for row in rows] == [None, "1", "2", "3"]
    assert rows[1]["round"]["1"]["paired"]["difference"] == pytest.approx(1 / 3)
    assert rows[1]["gate"]["why"] == "not worse: 0.3333 against 0.0000 on 4 tasks"
    assert found.run.values == {"solver.prompt": "say 3"}
    summary = json.loads((found.args.folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["after"]["accuracy"] == 1 > summary["eval"]["before"]["accuracy"]
    assert [row["in_force"] for row in summary["candidates"]] == [False, False, False, True]
    assert [row["parents"] for row in summary["candidates"]] == [[], ["0"], ["1"], ["2"]]
    assert summary["proposals"] == {"asked": 3, "dropped": {}}


def test_every_step_costs_the_same_and_a_group_has_one_prompt(
    found: PromptsAndWeightsTrainer,
) -> None:
    groups = defaultdict(list)
    for episode in Store(found.args.folder / "episodes").read(kind="train"):
        groups[episode.step, episode.group].append(episode)
    assert Counter(step for (step, _), own in groups.items() for _ in own) == {
        step: 8 for step in (1, 2, 3, 4)
    }
    assert [len(own) for (step, _), own in groups.items() if step > 1] == [2] * 12
    for own in groups.values():
        assert len({(e.state.key, e.task.id) for e in own}) == 1
    for step in (2, 3, 4):  # all candidates meet the same tasks
        by_state = defaultdict(set)
        for (number, _), own in groups.items():
            if number == step:
                by_state[own[0].state.key].add(own[0].task.id)
        first, second = by_state.values()
        assert first == second


def test_the_gate_keeps_out_what_validation_tasks_refuse(model: Path, tmp_path: Path) -> None:
    """At temperature 0, as tasks are validated, prompts 2 and 3 make the agent say 0."""

    def timid(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
        own = digit(prompt.partition("<|user|>")[0])
        reply = said(prompt, ref, sampling, k)
        return "0" if sampling.temperature == 0 and own in "23" else reply

    made = search(tmp_path / "run", model, timid)
    made.train()
    assert made.run.values == {"solver.prompt": "say 1"}
    gates = [row["prompts"].get("gate", {}).get("passed") for row in rows_of(made.args.folder)]
    assert gates == [None, True, False, False]
    assert made.search["2"].verdict == "worse: 0.0000 against 0.3333 on 4 tasks"
    other = search(tmp_path / "always", model, timid, gate="always", num_val_tasks=0)
    other.train()
    assert other.run.values == {"solver.prompt": "say 3"}, "the control lets all pass"


def test_a_proposer_of_nothing_usable_leaves_the_candidates_in_play(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = iter(["<INSTRUCTION>say", "", "<INSTRUCTION>say 99</INSTRUCTION>"])

    def useless(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
        asked = "Write a better instruction" in prompt
        return next(replies) if asked else said(prompt, ref, sampling, k)

    made = search(tmp_path / "run", model, useless, max_instruction_chars=5)
    summary = made.train()
    assert summary["proposals"] == {
        "asked": 3,
        "dropped": {"truncated": 1, "unanswered": 1, "too_long": 1},
    }
    assert [row["prompts"]["reward"] for row in rows_of(made.args.folder)] == [{"0": 0.0}] * 4
    assert (
        capsys.readouterr().err.count("none of 1 proposals of helpers.proposer can be tried") == 3
    )


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in summary["ledger"].values():
        for own in row.values():
            del own["seconds"]
    kept = ("eval", "ledger", "budget", "done", "state", "steps", "candidates", "proposals")
    stored = sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes"))
    prompts = [row["prompts"] for row in rows_of(folder)]
    return {**{key: summary[key] for key in kept}, "stored": stored, "prompts": prompts}


@pytest.mark.parametrize(
    "where",
    ["_judged", *(pytest.param(w, marks=pytest.mark.slow) for w in ("play", "propose", "learn"))],
)
def test_a_run_that_is_killed_inside_a_step_comes_to_the_same(
    where: str,
    found: PromptsAndWeightsTrainer,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the first candidate's episodes, the gate, the helper's reply, the update of step 2."""
    killed = search(tmp_path / "run", model)
    owner: Any = {"play": killed.run.rollouts, "propose": killed.proposer}.get(where, killed)
    own = getattr(owner, where)

    def cut(*args: Any, **settings: Any) -> Any:
        result = own(*args, **settings)
        if killed.run.step == 1:
            raise Cut
        return result

    monkeypatch.setattr(owner, where, cut)
    with pytest.raises(Cut):
        killed.train()
    search(tmp_path / "run", model, resume=True).train()
    assert facts(tmp_path / "run") == facts(found.args.folder)


@pytest.mark.parametrize(
    "limit", [900, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 1500))]
)
def test_a_budget_is_never_exceeded_and_the_run_ends_whole(
    limit: int, model: Path, tmp_path: Path
) -> None:
    summary = search(tmp_path / "run", model, budget={"tokens": limit}).train()
    assert summary["budget"]["spent"]["tokens"] <= limit and summary["steps"] < 4
    assert summary["done"] == "the budget is spent"
    assert summary["eval"]["after"]["accuracy"] is not None


def test_candidates_meet_equal_draws_and_a_step_others_than_the_one_before(
    found: PromptsAndWeightsTrainer, model: Path, tmp_path: Path
) -> None:
    seeds = defaultdict(set)
    for episode in Store(found.args.folder / "episodes").read(kind="train"):
        seeds[episode.step, episode.state.key].add((episode.task.id, episode.seed))
    for step in (2, 3, 4):
        first, second = (own for (number, _), own in seeds.items() if number == step)
        assert first == second
    still = search(tmp_path / "run", model, num_candidates=1, tasks_per_step=4, max_steps=2)
    still.train()
    again = list(Store(tmp_path / "run" / "episodes").read(kind="train"))
    assert len({episode.state.key for episode in again}) == 1
    assert len({episode.seed for episode in again}) == len(again) == 2 * 4 * 4
