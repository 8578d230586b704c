"""MaAS's runs: resume after a kill, budget, checkpoint and `marlora eval`, report, and the recipe on
the tiny model beside its controls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.patterns.vote import Vote
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.policy_gradient.maas import MaASConfig, MaASTrainer
from marlora.trainers.methods.text_feedback.textgrad import TextGradConfig, TextGradTrainer
from tests.repository import ROOT
from tests.trainers.reading import rows
from tests.trainers.supernets import queries, supernet, trainer

torch.set_num_threads(1)
SHORT: dict[str, Any] = dict(max_steps=4, save_every=2, num_eval_tasks=4, tasks_per_step=2)


def test_a_run_learns_saves_and_reports(tmp_path: Path, model: Path) -> None:
    trained = trainer(tmp_path / "run", model, **SHORT)
    summary = trained.train()
    found = rows(tmp_path / "run")
    assert len({row["state"] for row in found}) == 4, "every step moves the controller"
    assert all(row["supernet"]["cost"] > 0 and row["supernet"]["episodes"] == 8 for row in found)
    assert summary["tokens"]["trained"] == 0 and summary["policies"] == {}
    assert {*summary["supernet"]["before"]} == {"easy", "hard"} == {*summary["supernet"]["after"]}
    first = summary["supernet"]["before"]["easy"]
    assert first["queries"] == 2 and first["calls"] >= 1
    assert first["probabilities"]["layer1"] == pytest.approx({"quick": 0.5, "panel": 0.5})
    after = summary["supernet"]["after"]["easy"]["probabilities"]["layer1"]
    assert after["quick"] != pytest.approx(0.5, abs=1e-6)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "distance from the first weights" in report and "early_exit" in report
    weights = trained.controller.values()["supernet"]
    assert weights["1.hidden.weight"][:80] not in report, "packed numbers are nothing to read"


# resume


def facts(folder: Path, trained: MaASTrainer) -> dict[str, Any]:
    """All that two equal runs have in common."""
    timeless = [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")}
        for row in rows(folder)
    ]
    episodes = {e.id: (e.state.key, e.decisions, e.output) for e in Store(folder / "episodes")}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    both = {"eval": summary["eval"], "supernet": summary["supernet"]}
    return {"rows": timeless, "episodes": episodes, "part": trained.controller.sha256(), **both}


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize(
    "point",
    [
        "the controller moved",
        pytest.param("half of the episodes are stored", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    undisturbed = trainer(tmp_path / "whole", model, **SHORT)
    undisturbed.train()
    with monkeypatch.context() as patched:
        if point == "the controller moved":
            real = MaASTrainer.learn

            def learn(self: MaASTrainer, step: int, episodes: Any) -> dict[str, Any]:
                metrics = real(self, step, episodes)
                if step == 3:
                    raise Killed
                return metrics

            patched.setattr(MaASTrainer, "learn", learn)
        else:
            kept, extend = [0], Store.extend

            def count(self: Store, episodes: Any, **how: Any) -> None:
                kept[0] += 1
                if kept[0] > 4 + 2 * 8 + 3:  # in the middle of step 3
                    raise Killed
                extend(self, episodes, **how)

            patched.setattr(Store, "extend", count)
        with pytest.raises(Killed):
            trainer(tmp_path / "cut", model, **SHORT).train()
    assert len(rows(tmp_path / "cut")) == 2
    resumed = trainer(tmp_path / "cut", model, resume=True, **SHORT)
    resumed.train()
    assert facts(tmp_path / "cut", resumed) == facts(tmp_path / "whole", undisturbed)


def test_a_budget_ends_the_run_whole(tmp_path: Path, model: Path) -> None:
    """A step that the budget cuts off leaves the controller as it was before."""
    trained = trainer(tmp_path / "run", model, **SHORT, budget={"calls": 40})
    summary = trained.train()
    assert "budget" in summary["done"] and summary["budget"]["spent"]["calls"] <= 40
    assert 0 < len(rows(tmp_path / "run")) < 4
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    kept = json.loads((last / "values" / "values.json").read_text(encoding="utf-8"))
    assert kept["supernet"] == trained.controller.values()["supernet"]


def test_a_run_begins_with_the_weights_of_another(tmp_path: Path, model: Path) -> None:
    first = trainer(tmp_path / "first", model, **SHORT)
    first.train()
    begin = str(tmp_path / "first" / "checkpoints" / "step-000004")
    second = trainer(tmp_path / "second", model, **{**SHORT, "max_steps": 0}, init=begin)
    assert second.controller.sha256() == first.controller.sha256()
    # and so does one that rewrites the executors' prompts: the paper's textual gradient
    args = TextGradConfig(
        output_dir=str(tmp_path / "third"),
        model=str(model),
        init=begin,
        num_val_tasks=20,
        helpers={"backward": {}, "optimizer": {}},
    )
    third = TextGradTrainer(
        system=supernet(), tasks=queries(), eval_tasks=queries("eval"), rewards=["exact"], args=args
    )
    assert third.spec.values["supernet"] == first.controller.values()["supernet"]


def test_what_is_refused(tmp_path: Path, model: Path) -> None:
    settings: dict[str, Any] = dict(output_dir=str(tmp_path / "run"), model=str(model))
    with pytest.raises(SettingError, match=r"system.class: operators are learnt of a .*Supernet"):
        MaASTrainer(system=Vote(["a"]), args=MaASConfig(**settings))
    with pytest.raises(SettingError, match="cost_unit: no policy has a price"):
        trainer(tmp_path / "run", model, cost_unit="cost")
    with pytest.raises(SettingError, match=r"values.supernet: '1.hidden.weight' is missing"):
        trainer(tmp_path / "run", model, values={"supernet": {"x": "AAAA"}})


# checkpoints


def test_a_checkpoint_evaluates_as_its_run_did(tmp_path: Path, model: Path) -> None:
    """To the last digit, from a copy that has nothing but itself."""
    run = MaASTrainer(
        args=MaASConfig(
            output_dir=str(tmp_path / "run"),
            model=str(model),
            engine="transformers",
            system={
                "class": "marlora.agents.programs.supernet:Supernet",
                "agents": [{"name": "a", "policy": "base"}],
                "operators": {"one": "generate", "two": "generate"},
                "prompts": {"one": "1{problem}", "two": "{problem} 22"},
                "layers": 2,
            },
            tasks="marlora.rollouts.tasks.toy:tiny_tasks",
            rewards=["tests.trainers.small_run:bytes_mod_7"],
            num_eval_tasks=12,
            max_steps=2,
            tasks_per_step=2,
            max_completion_length=4,
            learning_rate=1.0,
        )
    )
    summary = run.train()
    found = summary["eval"]
    assert found["before"]["accuracy"] != found["after"]["accuracy"]
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000002", tmp_path / "copy")
    flags = ["--engine", "transformers", "--trust_checkpoint", "--output", str(tmp_path / "out")]
    main(["eval", str(tmp_path / "copy"), *flags])
    again = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert again[when] == found[when]


# the tiny model


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = yaml.safe_load((ROOT / "recipes" / "maas_supernet.yaml").read_text(encoding="utf-8"))
    short = {"num_eval_tasks": 40, "max_steps": 25, "learning_rate": 0.03}
    args = MaASConfig(**{**settings, "output_dir": str(folder), **short, **changes})
    return MaASTrainer(args=args).train()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_kind_finds_its_operator_on_the_tiny_model(tmp_path: Path) -> None:
    summary = recipe(tmp_path / "run")
    after, before = summary["supernet"]["after"], summary["supernet"]["before"]
    told = json.dumps(summary["supernet"])
    print(told)
    assert summary["eval"]["paired"]["ci95"][0] > 0.05, told
    for kind, operator in (("a", "careful_a"), ("b", "ask_b")):
        assert after[kind]["probabilities"]["layer1"][operator] > 0.6, told
        assert after[kind]["calls"] < before[kind]["calls"] / 4, told


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fixed_controller_learns_nothing_on_the_tiny_model(tmp_path: Path) -> None:
    summary = recipe(tmp_path / "run", learning_rate=0.0, max_steps=2)
    assert summary["eval"]["after"] == summary["eval"]["before"]
    assert summary["supernet"]["after"] == summary["supernet"]["before"]
