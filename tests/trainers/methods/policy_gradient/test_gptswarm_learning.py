"""GPTSwarm's runs: adversaries lose their edges to the output and truthful agents keep theirs, on
functions and on the tiny model; without a learning rate, or from rewards by chance, they do not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml

from marlora.agents.patterns.swarm import Swarm
from marlora.agents.patterns.vote import Vote
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.policy_gradient.gptswarm import GPTSwarmConfig, GPTSwarmTrainer
from tests.repository import ROOT
from tests.trainers.reading import rows
from tests.trainers.swarms import ADVERSARIES, TRUTHFUL, trainer

torch.set_num_threads(1)


def to_output(trained: GPTSwarmTrainer, agents: Sequence[str]) -> list[float]:
    """P(on) of these agents' edges to the output."""
    return [trained.table.probabilities()[f"{agent}->output"]["on"] for agent in agents]


def test_adversaries_lose_their_edges(tmp_path: Path, model: Path) -> None:
    trained = trainer(tmp_path / "run", model)
    summary = trained.train()
    truthful, adversaries = to_output(trained, TRUTHFUL), to_output(trained, ADVERSARIES)
    told = f"truthful {truthful}, adversaries {adversaries}, {summary['eval']}"
    print(told)
    assert min(truthful) > 0.7 and max(adversaries) < 0.3, told
    before, after = summary["eval"]["before"]["accuracy"], summary["eval"]["after"]["accuracy"]
    assert before < 0.5 and after > 0.9, told  # the whole graph; the edges more likely than not
    assert summary["eval"]["paired"]["ci95"][0] > 0.3, told
    assert summary["tokens"]["trained"] == 0 and summary["policies"] == {}
    found = rows(tmp_path / "run")
    assert fmean(r["reward"] for r in found[-8:]) > fmean(r["reward"] for r in found[:8]) + 0.1
    assert found[-1]["edges"]["entropy"] < found[0]["edges"]["entropy"]


@pytest.mark.parametrize(
    "control",
    [{"learning_rate": 0.0, "max_steps": 2}, {"reward_weights": {"chance": 1.0}}],
    ids=["no rate", "chance"],
)
def test_without_a_rate_or_from_chance_nothing_is_learnt(
    tmp_path: Path, model: Path, control: dict[str, Any]
) -> None:
    trained = trainer(tmp_path / "run", model, **control)
    summary = trained.train()
    truthful, adversaries = to_output(trained, TRUTHFUL), to_output(trained, ADVERSARIES)
    told = f"truthful {truthful}, adversaries {adversaries}, {summary['eval']}"
    print(told)
    assert fmean(truthful) - fmean(adversaries) < 0.2, told
    if "learning_rate" in control:
        assert {*truthful, *adversaries} == {0.5} and rows(tmp_path / "run")[0]["edges"]["loss"]
        assert summary["eval"]["after"] == summary["eval"]["before"]
    else:
        assert 0.5 not in {*truthful, *adversaries}, "the logits move, to no purpose"


def test_values_and_probabilities_to_begin_with(tmp_path: Path, model: Path) -> None:
    given = {"edges": {"a1->output": {"on": -50.0}, "t1->output": {"on": 1.0, "off": -1.0}}}
    made = trainer(tmp_path / "run", model, values=given, initial_probability=0.1)
    logits = made.table.logits
    assert logits["a1->output"] == {"on": -50.0, "off": 0.0}
    assert logits["t1->output"] == {"on": 2.0, "off": 0.0}
    assert logits["t2->output"]["on"] == pytest.approx(-2.197225, abs=1e-6)


def test_what_is_refused(tmp_path: Path, model: Path) -> None:
    settings: dict[str, Any] = dict(output_dir=str(tmp_path / "run"), model=str(model))
    with pytest.raises(
        SettingError, match=r"values.edges: no logits of 't9->output'; did you mean"
    ):
        trainer(tmp_path / "run", model, values={"edges": {"t9->output": {"on": 1.0}}})
    with pytest.raises(
        SettingError, match=r"system.class: edges are learnt of a .*Swarm, got Vote"
    ):
        GPTSwarmTrainer(system=Vote(["a"]), args=GPTSwarmConfig(**settings))
    with pytest.raises(SettingError, match=r"policies.a.trainable: this method trains no policy"):
        GPTSwarmTrainer(
            system=Swarm(["a", "b"]),
            args=GPTSwarmConfig(**settings, policies={"a": {"trainable": True}}),
        )


# resume


def facts(folder: Path, trained: GPTSwarmTrainer) -> dict[str, Any]:
    """All that two equal runs have in common."""
    timeless = [
        {key: value for key, value in row.items() if key not in ("seconds", "tokens_per_s")}
        for row in rows(folder)
    ]
    episodes = {e.id: (e.state.key, e.decisions, e.output) for e in Store(folder / "episodes")}
    summary = json.loads((folder / "summary.json").read_text())
    parts = trained.table.state_dict()  # moments of Adam included
    return {"rows": timeless, "episodes": episodes, "eval": summary["eval"], "parts": parts}


class Killed(Exception):
    """The process is gone."""


@pytest.mark.parametrize("point", ["the edges moved", "half of the episodes are stored"])
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    settings = dict(max_steps=6, save_every=2, num_eval_tasks=4, tasks_per_step=6)
    undisturbed = trainer(tmp_path / "whole", model, **settings)
    undisturbed.train()
    with monkeypatch.context() as patched:
        if point == "the edges moved":
            real = GPTSwarmTrainer.learn

            def learn(self: GPTSwarmTrainer, step: int, episodes: Any) -> dict[str, Any]:
                metrics = real(self, step, episodes)
                if step == 5:
                    raise Killed
                return metrics

            patched.setattr(GPTSwarmTrainer, "learn", learn)
        else:
            kept, extend = [0], Store.extend

            def count(self: Store, episodes: Any, **how: Any) -> None:
                kept[0] += 1
                if kept[0] > 4 + 4 * 6 + 3:  # in the middle of step 5
                    raise Killed
                extend(self, episodes, **how)

            patched.setattr(Store, "extend", count)
        with pytest.raises(Killed):
            trainer(tmp_path / "cut", model, **settings).train()
    assert len(rows(tmp_path / "cut")) == 4
    resumed = trainer(tmp_path / "cut", model, resume=True, **settings)
    resumed.train()
    assert facts(tmp_path / "cut", resumed) == facts(tmp_path / "whole", undisturbed)
    assert len({row["state"] for row in rows(tmp_path / "cut")}) == 6


# the tiny model


def recipe(folder: Path, **changes: Any) -> GPTSwarmTrainer:
    settings = yaml.safe_load((ROOT / "recipes" / "gptswarm_edges.yaml").read_text())
    return GPTSwarmTrainer(
        args=GPTSwarmConfig(**{**settings, "output_dir": str(folder), **changes})
    )


NAMES = {kind: [f"{kind}{number}" for number in (1, 2, 3)] for kind in ("truthful", "adversary")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_adversaries_lose_their_edges_on_the_tiny_model(tmp_path: Path, seed: int) -> None:
    trained = recipe(tmp_path / "run", seed=seed)
    summary = trained.train()
    truthful, adversaries = (to_output(trained, NAMES[k]) for k in ("truthful", "adversary"))
    told = f"truthful {truthful}, adversaries {adversaries}, {summary['eval']}"
    print(told)
    assert min(truthful) > 0.7 and max(adversaries) < 0.3, told
    before, after = summary["eval"]["before"]["accuracy"], summary["eval"]["after"]["accuracy"]
    assert before < 0.6 and after > 0.95 and summary["eval"]["paired"]["ci95"][0] > 0.3, told


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_without_a_rate_nothing_is_learnt_on_the_tiny_model(tmp_path: Path) -> None:
    trained = recipe(tmp_path / "run", learning_rate=0.0, max_steps=4)
    summary = trained.train()
    assert {*to_output(trained, NAMES["truthful"] + NAMES["adversary"])} == {0.5}
    assert summary["eval"]["after"] == summary["eval"]["before"]


def test_a_checkpoint_evaluates_as_its_run_did(tmp_path: Path, model: Path) -> None:
    """To the last digit, from a copy that has nothing but itself; agents read one another here."""
    agents = [{"name": name, "policy": "base"} for name in "abcd"]
    run = GPTSwarmTrainer(
        args=GPTSwarmConfig(
            output_dir=str(tmp_path / "run"),
            model=str(model),
            engine="transformers",
            system={"class": "marlora.agents.patterns.swarm:Swarm", "agents": agents},
            tasks="marlora.rollouts.tasks.toy:tiny_tasks",
            rewards=["tests.trainers.small_run:bytes_mod_7"],
            num_eval_tasks=12,
            max_steps=3,
            tasks_per_step=6,
            max_completion_length=4,
            learning_rate=2.0,
        )
    )
    summary = run.train()
    found = summary["eval"]
    assert found["before"]["accuracy"] != found["after"]["accuracy"]
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000003", tmp_path / "copy")
    flags = ["--engine", "transformers", "--trust_checkpoint", "--output", str(tmp_path / "out")]
    main(["eval", str(tmp_path / "copy"), *flags])
    again = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert again[when] == found[when]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "a-&gt;output" in report
