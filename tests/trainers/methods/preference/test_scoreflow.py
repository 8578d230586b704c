"""ScoreFlow as a run: programs are written, run several times, stored, paired and learnt from; the
controls learn from the same data.

The network knows nothing. What it says is put into its mouth (`Saying`); what it learns from is
real.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.programs.workflow import Workflow
from marlora.agents.system import build_system
from marlora.agents.types import AgentSpec, Sampling, SettingError
from marlora.rollouts.episodes.runner import EpisodeRequest
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.methods.preference.scoreflow import RUNS, ScoreFlowConfig, ScoreFlowTrainer
from tests.repository import ROOT
from tests.trainers.reading import rows
from tests.trainers.scoreflow_run import Saying, nobody, put_words, trainer
from tests.trainers.tiny_workflow import tiny_workflow

pytestmark = pytest.mark.usefixtures("one_thread")


def runs_of(episodes: Sequence[Episode], parent: Episode) -> list[Episode]:
    return [e for e in episodes if e.parent == parent.id]


def test_a_round_runs_every_valid_program_again_and_learns_from_pairs(
    tmp_path: Path, model: Path
) -> None:
    made = put_words(trainer(tmp_path / "run", model))
    summary = made.train()
    episodes = [e for e in Store(tmp_path / "run" / "episodes") if not e.group.startswith("eval-")]
    parents = [e for e in episodes if e.parent is None]
    assert len(parents) == 18
    for parent in parents:
        (valid,) = [r for r in parent.rewards if r.name == "valid"]
        again = runs_of(episodes, parent)
        assert len(again) == (2 if valid.value else 0)
        for child in again:
            assert (
                child.group == f"{parent.id}/{RUNS}/all" and child.task.answer == parent.task.answer
            )
            assert child.turns[0].completion == parent.turns[0].completion, (
                "the program is given, to the token"
            )
            assert "designer" not in {name for name, usage in child.usage.items() if usage.calls}, (
                "and not paid for again"
            )
            assert {r.name for r in child.rewards} >= {"exact", "valid", "ran"}
    outputs = {
        tuple(e.output for e in [p, *runs_of(episodes, p)]) for p in parents if runs_of(episodes, p)
    }
    assert any(len(set(each)) > 1 for each in outputs), "executors are sampled anew"
    (row,) = rows(tmp_path / "run")
    told = row["scoreflow"]
    assert (
        told["programs"] == 18
        and 0 < told["valid"] < 1
        and told["updates"] == 1
        and told["pairs"] == 12 <= 12 * told["pool"]
    )
    assert set(told["faults"]) <= {"name", "calls"} and sum(told["faults"].values()) == 18 - round(
        18 * told["valid"]
    )
    assert told["loss"] == pytest.approx(0.693147, abs=1e-5)  # the policy is the base still
    table, _ = made.table(episodes)
    assert told["score"] == pytest.approx(sum(r.score for r in table) / 18)
    assert {round(3 * r.score, 6) for r in table} <= {0.0, 1.0, 2.0, 3.0}
    policies = summary["policies"]
    assert policies["designer"]["sha256_before"] != policies["designer"]["sha256_after"] and set(
        policies
    ) == {"designer"}


def test_every_episode_can_be_replayed_from_the_store(tmp_path: Path, model: Path) -> None:
    made = put_words(trainer(tmp_path / "run", model))
    with made.run:
        episodes = made.collect(1)
        silent = dataclasses.replace(
            made.run.rollouts.runner,
            completers=dict.fromkeys(made.run.rollouts.runner.completers, nobody),
        )

        async def again(e: Episode) -> Episode:
            return await silent.play(
                EpisodeRequest(e.task, e.group, int(e.id.rsplit("/", 1)[1]), e.step),
                given=e.turns,
                seed=e.seed,
            )

        for episode in Store(tmp_path / "run" / "episodes"):
            replayed = made.run.rollouts.background.run(again(episode))
            assert (replayed.output, replayed.turns, replayed.rewards) == (
                episode.output,
                episode.turns,
                episode.rewards,
            )
        assert len(episodes) > 18


def test_a_resumed_round_takes_what_was_run(tmp_path: Path, model: Path) -> None:
    """Cut off after the programs and the runs of the first: what is stored is not played again, and
    the update is the same."""
    whole = put_words(trainer(tmp_path / "whole", model))
    whole.train()
    cut = put_words(trainer(tmp_path / "run", model))
    with cut.run:
        cut.collect(1)
    stored = len(list(Store(tmp_path / "run" / "episodes")))
    resumed = put_words(trainer(tmp_path / "run", model, resume=True))
    with resumed.run:
        for policy in resumed.run.rollouts.runner.completers.values():
            policy.__class__ = type(
                "Silent", (Saying,), {"__call__": lambda self, call, version: nobody(call, version)}
            )
        resumed.learn(1, resumed.collect(1))
        assert len(list(Store(tmp_path / "run" / "episodes"))) == stored
        (one,), (other,) = whole.run.learner.bases.values(), resumed.run.learner.bases.values()
        assert one.adapters.sha256("designer") == other.adapters.sha256("designer")


def test_without_an_informative_pair_the_round_is_skipped_aloud(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.trainers.scoreflow_run.WRITTEN", ["await magic('A')"])
    summary = put_words(trainer(tmp_path / "run", model)).train()
    assert all(p["sha256_before"] == p["sha256_after"] for p in summary["policies"].values())
    told = rows(tmp_path / "run")[0]["scoreflow"]
    assert (
        told["pairs"] == told["pool"] == 0 and told["valid"] == 0 and told["faults"] == {"name": 18}
    )
    assert "nothing to learn from" in (tmp_path / "run" / "warnings.log").read_text()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("played") / "run"
    put_words(trainer(folder, model)).train()
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "dpo", "alpha": 0.0, "invalid": "zero"},
        {"score_weighting": "chosen"},
        {"objective": "sft", "sft": {"num_train_epochs": 1, "train_batch_size": 4}},
        {"objective": "grpo", "grpo": {"epsilon": 0.1}},
        {"objective": "grpo", "invalid": "zero", "grpo": '{"beta": 0.01}'},
        {"num_train_epochs": 2, "train_batch_size": 5},
    ],
    ids=str,
)
def test_objectives_learn_from_one_store(
    tmp_path: Path, model: Path, played: Path, changes: dict[str, Any]
) -> None:
    summary = trainer(
        tmp_path / "run", model, episodes=str(played), tasks_per_step=3, **changes
    ).train()
    assert (
        summary["policies"]["designer"]["sha256_before"]
        != summary["policies"]["designer"]["sha256_after"]
    )
    assert {e.group.split("-")[0] for e in Store(tmp_path / "run" / "episodes")} == {"eval"}
    told = rows(tmp_path / "run")[0]["scoreflow"]
    assert told["score"] == rows(played)[0]["scoreflow"]["score"]
    if changes.get("num_train_epochs") == 2:
        assert told["updates"] == 6
    if changes.get("objective") == "sft":
        assert (
            0 < told["kept"] <= 3 and told["nll_after"]["designer"] < told["nll_before"]["designer"]
        )


def test_executors_are_trained_too_by_the_runs_of_one_program(tmp_path: Path, model: Path) -> None:
    agents = [
        AgentSpec("designer", sampling=Sampling(max_tokens=60)),
        AgentSpec("executor", sampling=Sampling(max_tokens=2)),
    ]
    system = tiny_workflow(agents=agents, seconds=0.5)
    summary = put_words(trainer(tmp_path / "run", model, system, objective="grpo")).train()
    assert all(p["sha256_before"] != p["sha256_after"] for p in summary["policies"].values())
    assert set(summary["policies"]) == {"designer", "executor"}
    with pytest.raises(
        SettingError, match=r"policies.executor: objective score_dpo trains the designer alone"
    ):
        trainer(tmp_path / "other", model, system)
    trainer(tmp_path / "frozen", model, system, policies={"executor": {"trainable": False}})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"objective": "ppo"}, "objective"),
        ({"invalid": "keep"}, "invalid"),
        ({"num_runs": 0}, "num_runs"),
        ({"alpha": -1.0}, "alpha"),
        ({"mode": "sampling"}, "mode"),
        ({"num_generations": 1}, "num_generations"),
        ({"sft": {"epochs": 1}}, "sft.epochs: unknown"),
        ({"grpo": "{"}, "grpo: expected a mapping"),
        ({"policies": {"designer": {"trainable": False}}}, "policies.designer"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, model: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(SettingError, match=why):
        trainer(tmp_path / "run", model, **changes)


def test_other_systems_are_refused(tmp_path: Path, model: Path) -> None:
    from marlora.rollouts.tasks.toy import tiny_tasks
    from marlora.trainers.testbeds.tiny import tiny_chain

    args = ScoreFlowConfig(output_dir=str(tmp_path), model=str(model), engine="transformers")
    with pytest.raises(SettingError, match="designer of a Workflow, got Chain"):
        ScoreFlowTrainer(
            system=tiny_chain(),
            tasks=tiny_tasks()[:4],
            eval_tasks=tiny_tasks("eval")[:2],
            rewards=["exact"],
            args=args,
        )


@pytest.mark.parametrize("name", ["scoreflow", "scoreflow_gsm8k"])
def test_the_recipes_settings_are_known_and_their_systems_can_be_built(name: str) -> None:
    settings = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    config = ScoreFlowConfig(**settings)
    system = build_system(config.system)
    assert isinstance(system, Workflow) and system.designer == "designer"
    assert [spec.policy for spec in system.specs] == ["designer", "base"]
