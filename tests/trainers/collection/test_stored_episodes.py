"""What a resumed run takes from its store is what the run that was cut off had played."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Task
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.collection.engines import EngineGroup
from marlora.trainers.collection.stored_episodes import find_stored, training_requests
from marlora.trainers.methods.imitation.correction import CORRECTION
from marlora.trainers.methods.imitation.sirius import SiriusTrainer
from tests.trainers.reading import rows
from tests.trainers.sirius_run import trainer
from tests.trainers.swarms import trainer as swarm_trainer


def played(group: str, sample: int = 0, parent: str | None = None) -> Episode:
    task = Task("t", "?", "7")
    return Episode(id=f"{group}/{sample}", group=group, task=task, seed=1, parent=parent, step=1)


def test_what_was_derived_from_an_episode_is_no_part_of_it(tmp_path: Path) -> None:
    """Its children, and theirs, are; one that was derived from a child is not either."""
    parent = "train-000001/t/0"
    inner, grand = f"{parent}/Chain/t", f"{parent}/Chain/t/0/Debate/t"
    episodes = [
        played(grand, 0, f"{inner}/0"),
        played(inner, 0, parent),
        played("train-000001/t"),
        played(f"{inner}/0/runs/all", 1, f"{inner}/0"),
        played(f"{parent}/runs/all", 1, parent),
        played(f"{parent}/runs/all", 2, parent),
        played("train-000001/t", 1),
        played(f"{parent}/runs/all/1/Chain/t", 0, f"{parent}/runs/all/1"),
    ]
    with Store(tmp_path) as store:
        store.extend(episodes)
        known = find_stored(store, training_requests([Task("t", "?", "7")], "train-000001", 2, 1))
    assert set(known.stored) == {episodes[k].id for k in (0, 1, 2, 6)}


def test_a_run_that_is_cut_off_after_corrections_counts_its_tokens_once(
    model: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: before the step is learnt from, and after that was done and not saved."""

    def counts(folder: Path) -> dict[str, Any]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        total = json.loads((folder / "summary.json").read_text())["tokens"]
        return {"rows": [(row["episodes"], row["sampled_tokens"]) for row in rows], **total}

    class Killed(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    settings = {"max_iterations": 1, "tasks_per_step": 3, "num_eval_tasks": 1}
    trainer(tmp_path / "whole", model, **settings).train()
    for resume, point in enumerate(("learn", "finish")):
        made = trainer(tmp_path / "cut", model, resume=bool(resume), **settings)
        with monkeypatch.context() as patch:
            if point == "learn":
                patch.setattr(SiriusTrainer, "learn", kill)
            else:
                patch.setattr(made.run, "save", kill)
            with pytest.raises(Killed):
                made.train()
    derived = [e for e in Store(tmp_path / "cut/episodes") if f"/{CORRECTION}/" in e.group]
    assert derived, "nothing was derived: the test tests nothing"
    trainer(tmp_path / "cut", model, resume=True, **settings).train()
    assert counts(tmp_path / "cut") == counts(tmp_path / "whole")
    left = [
        p.name for p in (tmp_path / "cut").rglob(".*") if p.name not in (".marlora-run", ".lock")
    ]
    assert left == []
    shutil.rmtree(tmp_path / "cut")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_what_other_values_played_is_not_recalled(
    rate: float,
    deterministic: bool,
    model: Path,
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No adapter moves. Step 4 was played and its checkpoint is lost. Resumed with another rate,
    step 3 is played with the values of before and step 4 with others."""
    monkeypatch.setattr(EngineGroup, "deterministic", deterministic)
    folder = tmp_path / "run"
    settings = dict(max_steps=4, tasks_per_step=4, num_eval_tasks=6, save_every=2)
    swarm_trainer(folder, model, learning_rate=1.0, **settings).train()
    before = {e.id: e for e in Store(folder / "episodes")}
    shutil.rmtree(folder / "checkpoints/step-000004")
    made = swarm_trainer(folder, model, learning_rate=rate, resume=True, **settings)
    made.train()
    assert made.run.state.versions == {}
    added = [e for e in Store(folder / "episodes") if e.id not in before]
    keys = {row["step"]: row["state"] for row in rows(folder)}
    last = next(e.state.key for e in before.values() if e.id.startswith("train-000004/"))
    if rate == 1.0:
        assert added == [] and last == keys[3], "all that was played is taken as it is"
        return
    assert last != keys[3]
    anew = [e for e in added if e.kind == "train"]
    assert len(anew) == 4 and all(e.id.startswith("train-000004.1/") for e in anew)
    assert all(e.state.key == keys[3] for e in anew)
    assert rows(folder)[3]["dropped_stale"]["episodes"] == 4
    assert "dropped_stale" not in rows(folder)[2], "step 3 is played by what played it before"
    after = [e for e in added if e.kind == "eval"]
    assert len(after) == 6 and {e.state.key for e in after} == {keys[4]}, "not an old evaluation"
    with made.run as run:
        assert {e.id for e in run.rollouts.stored("after")} == {e.id for e in after}
