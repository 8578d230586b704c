"""A policy that starts from a PEFT folder has that adapter's rank, alpha and targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from marlora.agents.types import AgentSpec, SettingError
from marlora.rollouts.files import adapter_sha256
from marlora.trainers.config import RunConfig
from marlora.trainers.model.adapter_files import WEIGHTS
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.testbeds.tiny import tiny_random_model

AGENTS = (AgentSpec("warm"), AgentSpec("new"))
SHAPES: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7, "target_modules": ["v_proj", "q_proj"]},
    {"r": 2, "lora_alpha": 1.5, "target_modules": ["up_proj"]},
    {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"},  # PEFT saves the names
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=SHAPES, ids=lambda shape: str(shape["target_modules"]))
def folder(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT itself saves it."""
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **request.param)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path)
    return tmp_path


def specs(**policies: Any) -> Any:
    config = RunConfig(policies=policies, lora_r=8, lora_alpha=16, lora_target_modules=["k_proj"])
    return config.policy_specs(AGENTS)


def test_the_shape_is_the_folders(folder: Path, model: Path) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())
    warm, new = specs(warm={"init": str(folder)}).values()
    assert (warm.adapter.r, warm.adapter.alpha) == (said["r"], said["lora_alpha"])
    assert set(warm.adapter.targets) == set(said["target_modules"])
    assert (new.adapter.r, new.adapter.alpha, new.adapter.targets) == (8, 16, ("k_proj",))
    base = AutoModelForCausalLM.from_pretrained(model)
    adapters = Adapters(base, [warm, new], seed=0, base_name=str(model))
    assert adapters.sha256("warm") == adapter_sha256(folder / WEIGHTS)


def test_what_is_set_must_agree(folder: Path) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())
    targets = list(reversed(said["target_modules"]))
    same = {"r": said["r"], "alpha": said["lora_alpha"], "targets": targets, "dropout": 0.5}
    assert specs(warm={"init": str(folder), "adapter": same})["warm"].adapter.dropout == 0.5
    for field, value in (("r", 9), ("alpha", 0.25), ("targets", ["o_proj"])):
        with pytest.raises(SettingError) as raised:
            specs(warm={"init": str(folder), "adapter": {field: value}})
        key = {"r": "r", "alpha": "lora_alpha", "targets": "target_modules"}[field]
        shown = sorted(said[key]) if field == "targets" else said[key]
        assert f"policies.warm.adapter.{field}: {value!r}, but {folder}" in str(raised.value)
        assert f"says {key} {shown!r}; leave policies.warm.adapter.{field} out" in str(raised.value)


def test_a_checkpoints_policy_is_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "solver"
    folder.mkdir(parents=True)
    config = {"r": 6, "lora_alpha": 12.0, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = specs(warm={"init": f"{tmp_path}#solver"})["warm"].adapter
    assert (adapter.r, adapter.alpha, adapter.targets) == (6, 12.0, ("q_proj",))


@pytest.mark.parametrize("config", [None, "{", '"\xff'])
def test_what_is_not_there_is_said_before_anything_is_loaded(
    config: str | None, tmp_path: Path
) -> None:
    """So `--dry_run true` says it too. A checkpoint without the policy is such a place."""
    folder = tmp_path / "adapters" / "solver"
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "adapter_config.json").write_bytes(config.encode("latin-1"))
    for init in (str(folder), f"{tmp_path}#solver"):
        with pytest.raises(SettingError, match=r"policies\.warm\.init: .*expected fresh, a PEFT"):
            specs(warm={"init": init})
    with pytest.raises(SettingError, match=r"policies\.warm\.init: 'nowhere': no adapter"):
        specs(warm={"init": "nowhere"})
    with pytest.raises(SettingError, match="nowhere"):
        RunConfig(init="nowhere/checkpoints/step-000004").policy_specs(AGENTS)
