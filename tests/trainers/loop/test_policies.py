"""Who may speak in a trained team: warm starts, frozen, shared and outside policies, the bare base,
two bases, a user's own System."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import Turn
from marlora.rollouts.checkpoints.team import LoadOptions, load_team
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.store import Store
from marlora.trainers.loop.run import TrainingRun
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from tests.trainers.outside import Outside
from tests.trainers.small_run import bytes_mod_7, config

CHAIN = {"agents": ["first", "last"], "views": {"first": "{prompt}", "last": "{previous}+{c}"}}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def earlier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of two steps; both adapters have moved."""
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    torch.set_num_threads(1)
    GRPOTrainer(
        system=tiny_chain(), rewards=[bytes_mod_7], args=config(folder, model, max_steps=2)
    ).train()
    return folder / "checkpoints" / "step-000002"


def train(
    folder: Path, model: Path, system: Any = None, **changes: Any
) -> tuple[dict[str, Any], TrainingRun]:
    settings = {"max_steps": 1, **changes}
    trainer = GRPOTrainer(
        system=system or Chain(**CHAIN),
        rewards=[bytes_mod_7],
        args=config(folder, model, **settings),
    )
    return trainer.train(), trainer.run


def turns(folder: Path, agent: str, step: int = 1) -> list[Turn]:
    """The turns an agent took in a step's training episodes."""
    found = [
        t
        for e in Store(folder / "episodes").read(step=step)
        if e.id.startswith("train")
        for t in e.turns
        if t.agent == agent
    ]
    assert found
    return found


def proofs(folder: Path, policy: str) -> list[dict[str, Any]]:
    return [
        proof
        for proof in json.loads((folder / "proofs.json").read_text())
        if proof["policy"] == policy
    ]


def moved(summary: dict[str, Any]) -> dict[str, bool]:
    return {
        name: entry["sha256_before"] != entry["sha256_after"]
        for name, entry in summary["policies"].items()
    }


# the ten lines


def test_ten_lines_in_a_notebook(model: Path, tmp_path: Path) -> None:
    async def cell() -> None:  # a loop is running, as in a notebook
        team = Chain(["solver", "reviewer"])
        small = dict(
            engine="transformers",
            max_steps=1,
            tasks_per_step=2,
            num_generations=2,
            max_completion_length=4,
            lora_r=2,
        )
        args = GRPOConfig(output_dir=str(tmp_path / "first"), num_eval_tasks=3, **small)  # type: ignore[arg-type]
        trainer = GRPOTrainer(model=str(model), system=team, tasks="arithmetic", args=args)
        summary = trainer.train()
        assert summary == json.loads((tmp_path / "first" / "summary.json").read_text())
        found = trainer.evaluate()
        assert set(found) >= {"accuracy", "ci95", "num_tasks"} and found["num_tasks"] == 3
        assert trainer.evaluate(2)["num_tasks"] == 2

    before = signal.getsignal(signal.SIGINT)
    asyncio.run(cell())
    assert signal.getsignal(signal.SIGINT) is before


def test_the_summary_has_every_pinned_key(model: Path, tmp_path: Path) -> None:
    summary, _ = train(tmp_path / "run", model)
    keys = {
        "recipe",
        "model",
        "engine",
        "steps",
        "seconds",
        "tokens",
        "policies",
        "live_proof",
        "eval",
    }
    assert keys <= set(summary)
    assert {"total", "rollout", "train", "publish"} <= set(summary["seconds"]) and {
        "sampled",
        "trained",
    } <= set(summary["tokens"])
    assert set(summary["policies"]) == {"first", "last"}
    for entry in summary["policies"].values():
        assert set(entry) >= {"trainable_parameters", "sha256_before", "sha256_after"}
        assert entry["trainable_parameters"] == 2 * (
            4 * (32 + 32) + 4 * (32 + 32)
        )  # 2 layers, r = 4, q and v of 32 x 32
    assert set(summary["live_proof"]) >= {"checks", "passed", "untrained", "failed", "max_residual"}
    assert (summary["live_proof"]["passed"], summary["live_proof"]["failed"]) == (2, 0)
    for when in ("before", "after"):
        assert {"accuracy", "ci95", "num_tasks"} <= set(summary["eval"][when])
    assert {"difference", "ci95"} <= set(summary["eval"]["paired"])
    assert (summary["recipe"], summary["engine"], summary["steps"]) == (
        "GRPOTrainer",
        "transformers",
        1,
    )
    assert moved(summary) == {"first": True, "last": True}


def test_a_run_goes_on_after_evaluation_with_the_adapters_it_has(
    model: Path, tmp_path: Path
) -> None:
    trainer = GRPOTrainer(
        system=tiny_chain(),
        rewards=[bytes_mod_7],
        args=config(tmp_path / "run", model, max_steps=1),
    )
    first = trainer.evaluate()
    summary = trainer.train()
    assert summary["eval"]["before"]["accuracy"] == first["accuracy"]
    hashes = {name: entry["sha256_after"] for name, entry in summary["policies"].items()}
    after = trainer.evaluate()
    assert after["accuracy"] == summary["eval"]["after"]["accuracy"]
    assert {
        name: trainer.run.learner.bases[str(model)].adapters.sha256(name) for name in hashes
    } == hashes
    with trainer.run as run:
        served = {t.version for e in run.rollouts.stored("step-000001") for t in e.turns}
    assert served == {f"{name}-v1-{digest[:8]}" for name, digest in hashes.items()}


# what policies may be


def test_warm_starts_and_a_frozen_policy(model: Path, earlier: Path, tmp_path: Path) -> None:
    saved = json.loads((earlier / "system.json").read_text())["adapters"]
    policies = {
        "first": {"init": str(earlier / "adapters" / "first")},
        "last": {"init": f"{earlier}#last", "trainable": False},
    }
    summary, _ = train(tmp_path / "run", model, policies=policies)
    for name in ("first", "last"):
        assert summary["policies"][name]["sha256_before"] == saved[name]["sha256"]
        # served from the first step on, as the version that was loaded
        assert {turn.version for turn in turns(tmp_path / "run", name)} == {
            f"{name}-v0-{saved[name]['sha256'][:8]}"
        }
    assert moved(summary) == {"first": True, "last": False}
    assert summary["policies"]["last"]["trainable_parameters"] == 0
    assert {proof["status"] for proof in proofs(tmp_path / "run", "last")} == {"passed"}
    assert not (
        tmp_path / "run" / "checkpoints" / "step-000001" / "trainer" / "last.safetensors"
    ).exists()


def test_two_agents_share_a_policy(model: Path, tmp_path: Path) -> None:
    agents = {"first": {"policy": "both"}, "last": {"policy": "both"}}
    summary, run = train(tmp_path / "run", model, agents=agents, max_steps=2)
    assert list(summary["policies"]) == ["both"] and moved(summary) == {"both": True}
    for agent in ("first", "last"):
        assert {turn.version.split("-v")[0] for turn in turns(tmp_path / "run", agent, step=2)} == {
            "both"
        }
    assert run.learner.policy_of == {"first": "both", "last": "both"}
    assert (summary["live_proof"]["passed"], summary["live_proof"]["failed"]) == (2, 0)


def test_an_agent_on_the_bare_base(model: Path, tmp_path: Path) -> None:
    summary, run = train(tmp_path / "run", model, agents={"first": {"policy": "base"}}, max_steps=2)
    assert moved(summary) == {"last": True} and run.learner.policy_of == {"last": "last"}
    assert {(turn.policy, turn.version) for turn in turns(tmp_path / "run", "first", step=2)} == {
        ("base", "")
    }
    assert {turn.version.split("-v")[0] for turn in turns(tmp_path / "run", "last", step=2)} == {
        "last"
    }


def test_an_outside_teammate_by_url(model: Path, tmp_path: Path) -> None:
    with Outside(lambda body: str(body["seed"] % 10)) as outside:
        policies = {"first": {"url": outside.url, "base": "far"}}
        summary, run = train(tmp_path / "run", model, policies=policies)
    assert moved(summary) == {"last": True} and run.learner.policy_of == {"last": "last"}
    told = turns(tmp_path / "run", "first")
    assert all(
        turn.token_ids == () and turn.prompt_ids == () and turn.text in "0123456789"
        for turn in told
    )
    assert all(
        turn.reads == (0,) and turn.messages[-1].content[0] in "0123456789"
        for turn in turns(tmp_path / "run", "last")
    )
    assert {body["model"] for body in outside.bodies} == {"far"}


def test_two_bases_in_one_team(model: Path, tmp_path: Path) -> None:
    other = tiny_random_model(tmp_path / "other", layers=1, seed=9)
    names = ["first", "critic", "last"]
    system = Chain(names, views={"first": "{prompt}", "critic": "{first}", "last": "{critic}+{c}"})
    agents, policies = {"critic": {"policy": "base"}}, {"last": {"base": str(other)}}
    summary, run = train(
        tmp_path / "run",
        model,
        system,
        agents=agents,
        policies=policies,
        max_steps=2,
        save_total_limit=1,
    )
    assert moved(summary) == {"first": True, "last": True}
    # 2 layers against 1, r = 4, q and v of 32 x 32
    assert [summary["policies"][name]["trainable_parameters"] for name in ("first", "last")] == [
        1024,
        512,
    ]
    assert [base.policies for base in run.learner.bases.values()] == [("first",), ("last",)]
    assert (summary["live_proof"]["passed"], summary["live_proof"]["failed"]) == (4, 0)
    speaker = run.rollouts.runner.completers["base"]
    assert isinstance(speaker, EngineCompleter) and speaker.engine.info().base == str(
        model
    )  # the run's own, not the last one started

    async def again() -> None:
        checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
        config = EngineConfig(engine="transformers")
        options = LoadOptions(
            rewards=["exact"], scratch=tmp_path / "scratch", say=lambda text: None
        )
        team = await load_team(checkpoint, config, options)
        try:
            bases = {
                name: speaker.engine.info().base
                for name, speaker in team.rollouts.completers.items()
            }  # type: ignore[attr-defined]
            assert bases == {"first": str(model), "base": str(model), "last": str(other)}
            assert set(team.versions) == {"first", "last"}
        finally:
            await team.close()

    asyncio.run(again())


def test_learning_rate_and_shape_of_each_policy(model: Path, tmp_path: Path) -> None:
    policies = {
        "first": {"learning_rate": 3e-3, "adapter": {"r": 2, "targets": ["k_proj"]}},
        "last": {"adapter": {"alpha": 4}},
    }
    summary, _ = train(tmp_path / "run", model, policies=policies)
    (row,) = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["policies"][name]["learning_rate"] for name in ("first", "last")] == [3e-3, 1e-2]
    shapes = {}
    for name in ("first", "last"):
        saved = json.loads(
            (
                tmp_path / "run/checkpoints/step-000001/adapters" / name / "adapter_config.json"
            ).read_text()
        )
        shapes[name] = (saved["r"], saved["lora_alpha"], saved["target_modules"])
    assert shapes == {"first": (2, 8, ["k_proj"]), "last": (4, 4, ["q_proj", "v_proj"])}
    assert moved(summary) == {"first": True, "last": True}


def test_a_system_of_the_users_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_team.py").write_text(
        "from dataclasses import dataclass\n"
        "from marlora.agents.concurrency import gather\nfrom marlora.agents.system import System\n"
        "@dataclass\n"
        "class Pair(System):\n"
        "    polite: bool = True\n"
        "    async def run(self, task, team):\n"
        "        a, b = await gather(agent.reply(task.prompt) for agent in team)\n"
        "        return a.text + b.text\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"class": "my_team:Pair", "agents": ["one", "two"], "polite": False}
    trainer = GRPOTrainer(
        rewards=[bytes_mod_7], args=config(tmp_path / "run", model, max_steps=1, system=settings)
    )
    assert moved(trainer.train()) == {"one": True, "two": True}
    saved = json.loads((tmp_path / "run/checkpoints/step-000001/system.json").read_text())
    assert saved["system"] == {"class": "my_team:Pair", "arguments": {"polite": False}}
