"""Adapters of the in-process engine stand in each other's place, and compute what they do alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from marlora.rollouts.engines.transformers_adapters import LoadedAdapters

torch.set_num_threads(1)
IDS = torch.tensor([[5, 9, 31, 7, 12, 40, 22]])
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Save = Callable[..., Path]


@pytest.fixture
def save(model: Path, tmp_path: Path) -> Save:
    def make(name: str, seed: int, **settings: Any) -> Path:
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model)
        config = LoraConfig(**{**PLAIN, "init_lora_weights": False, **settings})
        adapted = get_peft_model(base, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # modules that are saved whole are fresh copies else
                parameter.data += 0.02 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def adapters(model: Path) -> LoadedAdapters:
    base = AutoModelForCausalLM.from_pretrained(model).eval().requires_grad_(False)
    return LoadedAdapters(base, "cpu")


def logits(adapters: LoadedAdapters, version: str) -> torch.Tensor:
    adapters.activate(version)
    with torch.inference_mode():
        return adapters.model(input_ids=IDS).logits


def alone(model: Path, folder: Path | None) -> torch.Tensor:
    """The logits of the adapter as PEFT alone loads it, or of the bare base."""
    one = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.inference_mode():
        return (PeftModel.from_pretrained(one, folder) if folder else one)(input_ids=IDS).logits


def test_adapters_that_follow_one_another_are_what_they_are_alone(
    adapters: LoadedAdapters, save: Save, model: Path
) -> None:
    """Four come and go in the places of two, one with another scaling; and the base stays."""
    folders = [save(f"v{k}", k, lora_alpha=3 if k == 2 else 8) for k in range(4)]
    right = [alone(model, folder) for folder in folders]
    bare = alone(model, None)
    adapters.load(folders[0])
    for k in range(1, 4):
        adapters.load(folders[k])
        for version in (k, k - 1, k):
            assert torch.equal(logits(adapters, f"v{version}"), right[version])
        assert torch.equal(logits(adapters, ""), bare)
        adapters.unload(f"v{k - 1}")
        assert adapters.versions == (f"v{k}",)
    assert len(adapters.model.peft_config) == 2
    assert not torch.equal(right[2], right[3])
    assert not any(p.requires_grad for p in adapters.model.parameters())


def test_other_settings_get_a_place_of_their_own(
    adapters: LoadedAdapters, save: Save, model: Path
) -> None:
    first, wide = save("first", 0), save("wide", 1, r=2, target_modules=["q_proj", "o_proj"])
    rank_stable = save("stable", 2, use_rslora=True)
    for folder in (first, wide, rank_stable):
        adapters.load(folder)
        assert torch.equal(logits(adapters, folder.name), alone(model, folder))
        adapters.unload(folder.name)
    assert len(adapters.model.peft_config) == 3


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"alpha_pattern": {"q_proj": 2}}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_no_plain_lora_leaves_no_place_behind(
    adapters: LoadedAdapters, save: Save, model: Path, settings: dict[str, Any]
) -> None:
    plain, other, again = save("plain", 0), save("other", 1, **settings), save("again", 2)
    for folder in (plain, other):
        adapters.load(folder)
    for folder in (plain, other, plain):
        assert torch.equal(logits(adapters, folder.name), alone(model, folder))
    assert torch.equal(logits(adapters, ""), alone(model, None))
    for version in ("plain", "other"):
        adapters.unload(version)
    adapters.load(again)
    assert torch.equal(logits(adapters, "again"), alone(model, again))
    assert len(adapters.model.peft_config) == 1


def test_a_file_that_does_not_fit_the_place_changes_nothing(
    adapters: LoadedAdapters, save: Save, model: Path
) -> None:
    first, second, damaged = save("first", 0), save("second", 1), save("damaged", 2)
    file = damaged / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if ".lora_A." in key)
    adapters.load(first)
    adapters.unload("first")
    for wrong, says in (
        ({**tensors, key: tensors[key][:2].clone()}, "size mismatch for .*lora_A"),
        ({k: v for k, v in tensors.items() if k != key}, "missing .*lora_A"),
        ({**tensors, "base_model.model.odd": torch.zeros(1)}, "unknown .*odd"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=says):
            adapters.load(damaged)
        assert adapters.versions == ()
    adapters.load(second)
    assert torch.equal(logits(adapters, "second"), alone(model, second))
    assert len(adapters.model.peft_config) == 1
