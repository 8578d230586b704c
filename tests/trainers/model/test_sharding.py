"""A base that is split over ranks learns what a whole one learns, and what cannot be split is
refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.batching.batches import pack, pad_ranks, split_over_ranks
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.config import RunConfig
from marlora.trainers.model import sharding
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.base_models import dtype_of
from marlora.trainers.model.memory_estimate import estimate
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.repository import ROOT, throw_away
from tests.trainers import small_run
from tests.trainers.distributed.test_ranks import TORCHRUN, start

DEEPSPEED = ("deepspeed>=0.19.8,<0.20",)
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
YAMLS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of adapters and heads in the newest checkpoint."""
    last = max((folder / "checkpoints").iterdir())
    files = [path for path in last.rglob("*.safetensors") if path.stem in ("adapter_model", "head")]
    found = {
        f"{path.relative_to(last)} {key}": t.double()
        for path in files
        for key, t in load_file(path).items()
    }
    assert found
    return found


def assert_within_the_contract(mine: Path, theirs: Path) -> None:
    """Relative distance of everything learnt at most 1e-5."""
    a, b = learnt(mine), learnt(theirs)
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert float((a[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name


def run(
    program: str, folder: Path, model: Path, python: Path | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """What each of two ranks says; `python`: of an environment with DeepSpeed, which then splits
    the base."""
    command = [
        str(python or TORCHRUN[0]),
        *TORCHRUN[1:],
        "-m",
        f"tests.trainers.{program}",
        str(folder),
        str(model),
    ]
    done = start([*command, json.dumps(settings)], **(ZERO3 if python else {}))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(Path(f"{folder}.rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.process
def test_a_base_in_two_halves_learns_what_a_whole_one_learns(tmp_path: Path) -> None:
    """Three steps with activation checkpointing; in the second a rank has no batch of its own;
    proofs pass in the first and the third."""
    model = tiny_random_model(tmp_path / "model")
    halves = run(
        "rank_program", tmp_path / "halves", model, shard_base=True, gradient_checkpointing=True
    )
    small_run.trainer(tmp_path / "whole", model).train()
    assert_within_the_contract(tmp_path / "halves", tmp_path / "whole")
    assert halves[0]["sha256"] == halves[1]["sha256"] and halves[1]["batches"][2:4] == [
        [1, 0],
        [1, 0],
    ]
    assert halves[0]["split"] == ["(16, 32)", "(16, 96)", "(16,)", "(48, 32)"], (
        "half of every matrix and norm of a layer"
    )
    summary = json.loads((tmp_path / "halves/summary.json").read_text())
    assert summary["live_proof"]["passed"] == 4 and summary["live_proof"]["failed"] == 0


@pytest.fixture(scope="session")
def deepspeed() -> Path:
    return throw_away(DEEPSPEED, atop=True)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
def test_deepspeed_splits_a_base_as_fsdp2_does(tmp_path: Path, deepspeed: Path) -> None:
    """As above, by ZeRO-3's hooks."""
    model = tiny_random_model(tmp_path / "model")
    halves = run("rank_program", tmp_path / "halves", model, deepspeed, gradient_checkpointing=True)
    small_run.trainer(tmp_path / "whole", model).train()
    assert_within_the_contract(tmp_path / "halves", tmp_path / "whole")
    assert halves[0]["sha256"] == halves[1]["sha256"] and halves[1]["batches"][2:4] == [
        [1, 0],
        [1, 0],
    ]
    assert halves[0]["split"] == ["1536 of 3072", "16 of 32", "512 of 1024"], (
        "half of every matrix and norm of a layer"
    )
    summary = json.loads((tmp_path / "halves/summary.json").read_text())
    assert summary["live_proof"]["passed"] == 4 and summary["live_proof"]["failed"] == 0


@pytest.mark.slow
@pytest.mark.process
def test_policies_and_critics_on_a_base_in_two_halves(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    for name, settings in (("whole", {}), ("halves", {"shard_base": True})):
        run("ppo_program", tmp_path / name, model, **settings)
    assert_within_the_contract(tmp_path / "halves", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.process
def test_a_split_run_is_resumed(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    run("rank_program", tmp_path / "whole", model, shard_base=True)
    run("rank_program", tmp_path / "cut", model, shard_base=True, max_steps=2)
    run("rank_program", tmp_path / "cut", model, shard_base=True, resume=True)
    assert learnt(tmp_path / "cut").keys() == learnt(tmp_path / "whole").keys()
    assert all(
        torch.equal(t, learnt(tmp_path / "whole")[name])
        for name, t in learnt(tmp_path / "cut").items()
    )


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["cpu", "fsdp2", "deepspeed_zero3"])
def test_configurations_of_accelerate_start_a_run(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """On a CPU, with two processes; what the others need is a GPU."""
    model, folder = tiny_random_model(tmp_path / "model"), tmp_path / "run"
    sizes = [
        "--tasks_per_step",
        "2",
        "--num_generations",
        "2",
        "--num_eval_tasks",
        "2",
        "--max_completion_length",
        "4",
    ]
    config = ["--config_file", f"recipes/accelerate/{name}.yaml", "--num_processes", "2"]
    settings = [
        "--model",
        str(model),
        "--engine",
        "transformers",
        "--max_steps",
        "1",
        "--output_dir",
        str(folder),
    ]
    python = request.getfixturevalue("deepspeed") if name == "deepspeed_zero3" else sys.executable
    done = start(
        [
            str(python),
            "-m",
            "accelerate.commands.launch",
            *config,
            "recipes/grpo_team.py",
            *settings,
            *sizes,
        ]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert ("layers are split over 2 ranks" in done.stderr) == (name != "cpu")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.num_processes >= 1 and found.mixed_precision == "no"
    assert set(yaml.safe_load(path.read_text())) <= {
        *vars(found),
        "fsdp_config",
        "deepspeed_config",
    }


def test_what_of_accelerate_is_not_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert sharding.sharding_mode(False, {}) == "" and sharding.sharding_mode(True, {}) == "fsdp2"
    assert sharding.sharding_mode(False, {**fsdp, "FSDP_OFFLOAD_PARAMS": "false"}) == "fsdp2"
    for environ, words in (
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, 2 expected"),
        ({**fsdp, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "zero_stage 2, 3 expected.*deepspeed_zero3.yaml",
        ),
        (
            {**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "offload_param_device nvme",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "deepspeed_config_file is not read",
        ),
    ):
        with pytest.raises(SettingError, match=words):
            sharding.sharding_mode(False, environ)
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"marlora\[deepspeed\]"):
        sharding.sharding_mode(False, ZERO3)
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: name)
    assert (
        sharding.sharding_mode(
            False, {**ZERO3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}
        )
        == "deepspeed"
    )


def test_one_process_has_nobody_to_share_with(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="expected several processes to share the base, got one"):
        small_run.trainer(tmp_path / "run", model, shard_base=True).train()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SettingError, match="zero_stage None, 3 expected"):
        small_run.trainer(tmp_path / "other", model).train()


def test_deepspeed_wants_adapters_on_the_same_linear_maps(model: Path) -> None:
    """It gathers map by map, and the backward pass needs other maps' weights where the first
    layer's adapters stand elsewhere."""
    base = AutoModelForCausalLM.from_pretrained(model)
    specs = [
        PolicySpec("a", adapter=AdapterSpec(targets=("q_proj",))),
        PolicySpec("b", adapter=AdapterSpec(targets=("o_proj",))),
    ]
    with pytest.raises(SettingError, match=r"DeepSpeed.*policy 'b'.*targets"):
        sharding.same_targets(Adapters(base, specs, seed=0))
    sharding.same_targets(Adapters(AutoModelForCausalLM.from_pretrained(model), specs[:1], seed=0))


def test_ranks_get_as_many_batches_and_the_added_ones_are_muted() -> None:
    def sample(length: int) -> TrainingSequence:
        ids, mask = tuple(range(length)), (0,) * (length - 1) + (1,)
        zeros = (0.0,) * length
        return TrainingSequence(
            "p", f"e{length}", ids, mask, zeros, zeros, (1.0,) * length, tuple(m - 1 for m in mask)
        )

    dealt = split_over_ranks(pack([sample(n) for n in (9, 5, 3)], max_tokens=4, layout="padded"), 4)
    assert [len(mine) for mine in dealt] == [1, 1, 1, 0]
    levelled = pad_ranks(dealt)
    assert [[(b.turns[0][0], b.is_padding) for b in mine] for mine in levelled] == [
        [("e9", False)],
        [("e5", False)],
        [("e3", False)],
        [("e3", True)],
    ]
    assert pad_ranks([[], []]) == [[], []]


def test_the_estimate_of_a_split_base(model: Path) -> None:
    """Layers are shared by the ranks, two of them whole at a time while a pass goes through; the
    rest is whole."""
    whole = estimate(
        str(model), [], RunConfig(), dtype_of(str(model), "float32", torch.device("cpu"))
    )
    halves = estimate(str(model), [], RunConfig(), torch.float32, ranks=2)
    outside = 264 * 32 + 32  # embeddings (the head is tied to them) and the last norm
    layers = whole.parameters - outside
    assert halves.weights == 4 * (
        outside + layers / 2 + 2 * layers / 2
    )  # two layers: both are gathered in turn
    assert halves.parameters == whole.parameters and halves.activations == whole.activations
