"""Runs in which no weight learns: frozen adapters, the bare base, outside models. No base is loaded
into the trainer, and the run works to its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError
from marlora.recipes.cli.checkpoint import serve
from marlora.recipes.cli.main import main
from marlora.recipes.launch.tables import summary_table
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import samples
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.dry_run import plan
from marlora.trainers.loop.spec import RunSpec
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from marlora.trainers.trainer import Trainer
from marlora.trainers.update import learner_base
from marlora.trainers.weight_sync.verification import WeightMismatch
from tests.trainers import small_run
from tests.trainers.outside import Outside

REWARD = "tests.trainers.small_run:bytes_mod_7"
TRUST = ("--trust_checkpoint",)
BARE = {"first": {"policy": "base"}, "last": {"policy": "base"}}

pytestmark = pytest.mark.usefixtures("one_thread")


class Idle(Trainer[RunConfig]):
    """A method that changes no weight."""

    Config = RunConfig

    def learn(self, step: int, episodes: list[Episode]) -> dict[str, Any]:  # type: ignore[override]
        return {"seen": len(episodes)}


def idle(folder: Path, model: Path | str, engine: Any = None, **changes: Any) -> Idle:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="marlora.rollouts.tasks.toy:tiny_tasks",
        rewards=[REWARD],
        num_eval_tasks=3,
        max_steps=2,
        tasks_per_step=2,
        num_generations=2,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
    )
    return Idle(system=tiny_chain(), args=RunConfig(**{**settings, **changes}), engine=engine)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer must not read a base's weights."""

    def refuse(name: str, *rest: Any) -> Any:
        raise AssertionError(f"the weights of {name} were read")

    monkeypatch.setattr(learner_base, "_read_weights", refuse)


@pytest.fixture(scope="module")
def earlier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run of two steps; both adapters have moved."""
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    torch.set_num_threads(1)
    small_run.trainer(folder, model, max_steps=2).train()
    return folder / "checkpoints" / "step-000002"


def frozen(checkpoint: Path) -> dict[str, Any]:
    """Policies that are the checkpoint's adapters and do not learn."""
    return {
        name: {"init": f"{checkpoint}#{name}", "trainable": False} for name in ("first", "last")
    }


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def episodes(folder: Path, beginning: str) -> list[Episode]:
    found = [e for e in Store(folder / "episodes") if e.id.startswith(beginning)]
    return sorted(found, key=lambda episode: episode.id)


def evaluated(checkpoint: Path, *flags: str) -> dict[str, Any]:
    """What `marlora eval` measures of the checkpoint's own held-out tasks."""
    folder = checkpoint.parent.parent / f"eval-{checkpoint.name}"
    code = main(
        [
            *("eval", str(checkpoint), "--engine", "transformers", *TRUST),
            *("--output", str(folder), *flags),
        ]
    )
    assert code in (0, None)
    return dict(json.loads((folder / "eval.json").read_text(encoding="utf-8")))


def refused(capsys: pytest.CaptureFixture[str], words: str, *argv: str) -> None:
    """The command ends with one line that holds these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2 and words in capsys.readouterr().err


# outside models


def test_a_team_of_outside_models_works_to_the_end(
    tmp_path: Path,
    no_weights: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with Outside(lambda body: str(sum(map(ord, body["messages"][-1]["content"])) % 10)) as outside:
        policies = {name: {"url": outside.url, "base": "far"} for name in ("first", "last")}
        trainer = idle(folder, "", policies=policies, eval_every=1)
        summary = trainer.train()
        greedy = sum(body["temperature"] == 0 for body in outside.bodies)
        assert len(outside.bodies) - greedy == 2 * 2 * 2 * 2  # agents, steps, tasks, samples

        assert trainer.run.learner.bases == {} and trainer.run.engines.of == {}
        assert (summary["model"], summary["engine"], summary["policies"]) == ("", "none", {})
        assert summary["live_proof"] == {
            "checks": 0,
            "passed": 0,
            "untrained": 0,
            "failed": 0,
            "max_residual": 0.0,
        }
        assert summary["eval"]["paired"]["difference"] == 0.0
        rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["seen"] for row in rows] == [4, 4]
        for title in ("Adapters", "Live proof", "Scalar heads"):
            assert f"<h2>{title}</h2>" not in page(folder)
        shown = summary_table(summary, str(folder))
        assert "live proof" not in shown and "adapters" not in shown and "--ablate" not in shown

        # a resume asks for what is new only: one step, for the team is the same as before
        again = idle(folder, "", policies=policies, max_steps=3, resume=True).train()
        assert len(outside.bodies) == greedy + 3 * 2 * 2 * 2
        assert again["eval"] == summary["eval"] and again["steps"] == 3

        capsys.readouterr()
        found = evaluated(folder / "checkpoints" / "step-000003")
        assert found["eval"]["after"]["accuracy"] == again["eval"]["after"]["accuracy"]
        last = str(folder / "checkpoints" / "step-000003")
        refused(capsys, "--trust_checkpoint", "eval", last)
        monkeypatch.setattr(serve, "choose_engine", lambda config: ("vllm", "as set"))
        refused(capsys, "nothing to serve here", "serve", last, *TRUST)
        main(["report", str(folder)])
        assert "tokens are not shown" not in capsys.readouterr().err
        main(["collect", last, *TRUST, "--output", str(tmp_path / "more"), "--num_tasks", "2"])
        main(["export", last, "--output", str(tmp_path / "team")])
        card = (tmp_path / "team" / "README.md").read_text(encoding="utf-8")
        assert "A team of 2 agents on models of others, with 0 LoRA adapters" in card


def test_a_plan_without_a_base(tmp_path: Path) -> None:
    policies = {name: {"url": "http://far/v1"} for name in ("first", "last")}
    lines = plan(idle(tmp_path / "run", "", policies=policies).spec).lines()
    text = "\n".join(lines)
    assert "engine       none (every policy is an outside model)" in text
    assert "no base is loaded for training" in text
    assert "GiB" not in text and "gradient checkpointing" not in text


def test_a_base_is_still_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    policies = {"first": {"url": "http://far/v1"}}
    with pytest.raises(SettingError, match="model: empty, but policies last need a base"):
        idle(tmp_path / "run", "", policies=policies).train()


# the bare base


def test_a_base_only_team_needs_no_weights_of_ours(
    model: Path, tmp_path: Path, no_weights: None
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: str(len(prompt) + k))
    trainer = idle(tmp_path / "run", bare, engine, agents=BARE)
    summary = trainer.train()
    assert (summary["policies"], summary["engine"]) == ({}, "scripted")
    assert summary["live_proof"]["checks"] == summary["live_proof"]["failed"] == 0
    for title in ("Adapters", "Live proof"):
        assert f"<h2>{title}</h2>" not in page(tmp_path / "run")
    turns = [t for e in episodes(tmp_path / "run", "train") for t in e.turns]
    assert len(turns) == 16 and {(t.policy, t.version) for t in turns} == {("base", "")}


def test_a_base_only_team_on_the_in_process_engine(
    model: Path, tmp_path: Path, no_weights: None
) -> None:
    folder = tmp_path / "run"
    whole = idle(folder, model, agents=BARE, max_steps=3).train()
    halved = tmp_path / "halved"
    idle(halved, model, agents=BARE, max_steps=1).train()
    resumed = idle(halved, model, agents=BARE, max_steps=3, resume=True).train()
    assert resumed["eval"] == whole["eval"]
    tokens = [
        [[(t.token_ids, t.logprobs) for t in e.turns] for e in episodes(each, "train")]
        for each in (folder, halved)
    ]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 12
    found = evaluated(folder / "checkpoints" / "step-000003")
    assert found["eval"]["after"]["accuracy"] == whole["eval"]["after"]["accuracy"]


# frozen adapters


def test_frozen_adapters_are_served_and_not_loaded(
    model: Path, earlier: Path, tmp_path: Path, no_weights: None
) -> None:
    folder = tmp_path / "run"
    summary = idle(folder, model, policies=frozen(earlier)).train()
    saved = json.loads((earlier / "system.json").read_text(encoding="utf-8"))["adapters"]
    for name in ("first", "last"):
        sha256 = saved[name]["sha256"]
        assert summary["policies"][name] == {
            "trainable_parameters": 0,
            "sha256_before": sha256,
            "sha256_after": sha256,
        }
        spoken = [t for e in episodes(folder, "train") for t in e.turns if t.policy == name]
        assert {turn.version for turn in spoken} == {f"{name}-v0-{sha256[:8]}"}

    # identity is compared, which proves no training and says so
    records = json.loads((folder / "proofs.json").read_text(encoding="utf-8"))
    assert [(r["policy"], r["status"]) for r in records] == [
        ("first", "identity"),
        ("last", "identity"),
    ]
    assert summary["live_proof"] == {
        "checks": 0,
        "passed": 0,
        "untrained": 0,
        "failed": 0,
        "max_residual": 0.0,
        "identity": 2,
    }
    assert "<h2>Adapters</h2>" not in page(folder)
    assert "there was nothing to prove. 2 frozen adapters" in page(folder)
    assert "nothing was trained" in summary_table(summary, str(folder))

    # the checkpoint holds them, stamped with the base that they were made for
    last = folder / "checkpoints" / "step-000002"
    for name in ("first", "last"):
        file = f"adapters/{name}/adapter_model.safetensors"
        assert (last / file).read_bytes() == (earlier / file).read_bytes()
    found = evaluated(last)
    assert found["eval"]["after"]["accuracy"] == summary["eval"]["after"]["accuracy"]
    resumed = idle(folder, model, policies=frozen(earlier), max_steps=3, resume=True).train()
    assert resumed["eval"]["after"] == summary["eval"]["after"] and resumed["steps"] == 3


def test_fresh_frozen_adapters_are_the_base(model: Path, tmp_path: Path, no_weights: None) -> None:
    policies = {name: {"trainable": False} for name in ("first", "last")}
    folder = tmp_path / "run"
    summary = idle(folder, model, policies=policies).train()
    assert {t.version for e in episodes(folder, "train") for t in e.turns} == {""}
    system = folder / "checkpoints" / "step-000002" / "system.json"
    adapters = json.loads(system.read_text(encoding="utf-8"))["adapters"]
    assert {name: entry["trained"] for name, entry in adapters.items()} == {
        "first": False,
        "last": False,
    }
    assert summary["eval"]["paired"]["difference"] == 0.0
    assert summary["live_proof"]["checks"] == 0


def test_another_adapter_than_the_runs_is_still_refused(
    model: Path, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.engines.transformers import TransformersEngine

    true = TransformersEngine.adapters

    async def swapped(self: Any, replica: str) -> dict[str, str]:
        listed = await true(self, replica)
        folders = list(listed.values())[::-1]
        return dict(zip(listed, folders, strict=True))

    monkeypatch.setattr(TransformersEngine, "adapters", swapped)
    with pytest.raises(WeightMismatch, match="identity: the replica serves 'first-v0"):
        idle(tmp_path / "run", model, policies=frozen(earlier)).train()
    records = json.loads((tmp_path / "run" / "proofs.json").read_text(encoding="utf-8"))
    assert {record["status"] for record in records} == {"failed"}


def test_adapters_that_name_another_base_are_compared_by_its_weights(
    model: Path, earlier: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    summary = idle(tmp_path / "run", moved, policies=frozen(earlier), max_steps=1).train()
    assert summary["live_proof"]["identity"] == 2
    other = tiny_random_model(tmp_path / "other", seed=9)
    with pytest.raises(SettingError, match="whose weights differ"):
        idle(tmp_path / "second", other, policies=frozen(earlier)).train()


def test_adapters_that_do_not_fit_are_refused_without_weights(
    model: Path, earlier: Path, tmp_path: Path, no_weights: None
) -> None:
    wide = tiny_random_model(tmp_path / "wide", layers=1)
    for path in (earlier / "adapters").iterdir():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        shutil.copytree(path, tmp_path / path.name)
        config["base_model_name_or_path"] = str(wide)
        text = json.dumps(config)
        (tmp_path / path.name / "adapter_config.json").write_text(text, encoding="utf-8")
    policies = {n: {"init": str(tmp_path / n), "trainable": False} for n in ("first", "last")}
    with pytest.raises(SettingError, match="tensors differ in name"):
        idle(tmp_path / "run", wide, policies=policies).train()


def test_a_resume_compares_the_bases_files_where_its_weights_are_not_loaded(
    model: Path, tmp_path: Path
) -> None:
    """Also between a run that learnt and one that does not."""
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(model, base)
    trained = small_run.trainer(folder, base, max_steps=1).train()
    policies = {name: {"trainable": False} for name in ("first", "last")}
    both = idle(folder, base, policies=policies, num_eval_tasks=2, resume=True).train()
    assert both["steps"] == 2
    for name in ("first", "last"):  # what was learnt is kept and served
        learnt = trained["policies"][name]["sha256_after"]
        assert both["policies"][name]["sha256_after"] == learnt
    again = idle(folder, base, policies=policies, num_eval_tasks=2, max_steps=3, resume=True)
    tiny_random_model(tmp_path / "other", seed=9)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(SettingError, match="with other weights"):
        again.train()


def test_log_probabilities_on_a_frozen_base_are_those_of_a_loaded_one(
    model: Path, earlier: Path, tmp_path: Path
) -> None:
    policies = frozen(earlier)
    learning = {"first": policies["first"] | {"trainable": True}, "last": policies["last"]}
    values, nll = {}, {}
    for name, specs in (("frozen", policies), ("loaded", learning)):
        trainer = idle(tmp_path / name, model, policies=specs, max_steps=1)
        with trainer.run.open() as run:
            played = run.rollouts.collect(1)
            weights = {(e.id, t.index, t.sibling): 1.0 for e in played for t in e.turns}
            sequences, _ = samples(played, weights, {"first": "first", "last": "last"})
            base = run.learner.bases[str(model)]
            assert base.weightless == (name == "frozen")
            values[name] = [
                run.learner.turn_logprobs(sequences),
                run.learner.turn_logprobs(sequences, reference=True),
                run.learner.reference_logprobs(sequences).tolist(),
            ]
            nll[name] = run.learner.mean_nll(sequences, {"first": "last"})
            assert not base.weightless
            run.learner.check_bases()
    assert values["frozen"] == values["loaded"] and nll["frozen"] == nll["loaded"]
    assert len(values["frozen"][0]) == 8


def test_log_probabilities_of_the_bare_base_are_the_engines(model: Path, tmp_path: Path) -> None:
    trainer = idle(tmp_path / "run", model, agents=BARE, max_steps=1)
    with trainer.run.open() as run:
        played = run.rollouts.collect(1)
        turns = {(e.id, t.index, t.sibling): t for e in played for t in e.turns}
        sequences, _ = samples(played, dict.fromkeys(turns, 1.0), {"first": "base", "last": "base"})
        values = run.learner.turn_logprobs(sequences)
        assert not run.learner.bases[str(model)].weightless
    assert values.keys() == turns.keys() and len(values) == 8
    for key, turn in turns.items():
        assert values[key] == pytest.approx(sum(turn.logprobs), abs=1e-3)


def test_a_base_that_is_served_only_stands_in_the_plan(model: Path, tmp_path: Path) -> None:
    other = tiny_random_model(tmp_path / "other", layers=1, seed=9)
    frozen_last = {"last": {"base": str(other), "trainable": False}}
    text = "\n".join(plan(idle(tmp_path / "run", model, policies=frozen_last).spec).lines())
    assert f"{other}: 0.0M parameters, adapters 0.00M; served, not loaded for training" in text
    assert "gradient checkpointing off" in text
    both = {name: {"trainable": False} for name in ("first", "last")}
    spec: RunSpec = idle(tmp_path / "run", model, policies=both).spec
    text = "\n".join(plan(spec).lines())
    assert "trainer 0  CPU: no base is loaded for training" in text or "GPU" in text
    assert "gradient checkpointing" not in text
