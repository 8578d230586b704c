"""An `init` folder that PEFT wrote, of every kind of LoRA: it is the policy that PEFT has on it, or
it is refused with the reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from marlora.agents.types import AdapterSpec, PolicySpec, SettingError
from marlora.trainers.model.adapters import Adapters
from tests.trainers.random_models import random_model

pytestmark = pytest.mark.usefixtures("one_thread")
TARGETS = ["q_proj", "v_proj"]
IDS = torch.tensor([[3, 5, 7, 11, 13, 17]])

# what PEFT can make of a LoRA, and whether we take it
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "dropout": ({"lora_dropout": 0.3}, True),
    "random B": ({"init_lora_weights": False}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "all targets by a pattern": ({"target_modules": r".*\.(q|v)_proj"}, True),
    "excludes what it does not target": ({"exclude_modules": ["k_proj"]}, True),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_4"}, False),
    "olora": ({"init_lora_weights": "olora"}, False),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, False),
    "rslora": ({"use_rslora": True}, False),
    "dora": ({"use_dora": True}, False),
    "ranks": ({"rank_pattern": {"layers.0.self_attn.q_proj": 1}}, False),
    "alphas": ({"alpha_pattern": {"layers.0.self_attn.q_proj": 16}}, False),
    "layers": ({"layers_to_transform": [0]}, False),
    "all layers by number": ({"layers_to_transform": [0, 1]}, False),
    "modules": ({"modules_to_save": ["lm_head"]}, False),
    "biases": ({"bias": "lora_only"}, False),
    "bias of B": ({"lora_bias": True}, False),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, False),
    "tokens": ({"trainable_token_indices": [3, 5]}, False),
    "excluded": ({"exclude_modules": r".*layers\.0.*q_proj"}, False),
    "head": ({"target_modules": [*TARGETS, "lm_head"]}, False),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.log_softmax(-1)


def saved(folder: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Make an adapter, train it a little, save it; the log-probs it has."""
    shape = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    base = random_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(**(shape | settings)))
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    step = torch.randn(parameter.shape, generator=noise)
                    parameter += 0.2 * step * (".lora_" in name or "token" in name)
        model.save_pretrained(folder)
    return logits(model)


def loaded(folder: Path) -> Adapters:
    spec = AdapterSpec(r=2, alpha=4, targets=tuple(TARGETS))
    policy = PolicySpec("a", adapter=spec, init=str(folder))
    return Adapters(random_model(), [policy], seed=0)


@pytest.mark.parametrize(("settings", "right"), KINDS.values(), ids=KINDS)
def test_a_folder_of_peft_s_is_that_policy_or_refused(
    settings: dict[str, Any], right: bool, tmp_path: Path
) -> None:
    expected = saved(tmp_path, settings)
    if not right:
        with pytest.raises(SettingError, match=r"policy 'a': adapter in"):
            loaded(tmp_path)
        return
    adapters = loaded(tmp_path)
    with adapters.active("a") as model:
        assert torch.allclose(logits(model), expected, atol=1e-5)
    with adapters.active("base") as model:
        assert (logits(model) - expected).abs().max() > 0.05


CHANGED: list[tuple[str, Any, str]] = [
    ("init_lora_weights", "corda", "leave the base's weights alone"),
    ("init_lora_weights", "loftq", "leave the base's weights alone"),
    ("init_lora_weights", "lora_ga", "leave the base's weights alone"),
    ("init_lora_weights", "mica", "leave the base's weights alone"),
    ("init_lora_weights", 1, "leave the base's weights alone"),
    ("loftq_config", {"loftq_bits": 4}, "not known"),
    ("corda_config", {"corda_method": "kpm"}, "not known"),
    ("lora_ga_config", {"direction": "ArB2r"}, "not known"),
    ("arrow_config", {"top_k": 2}, "not known"),
    ("alora_invocation_tokens", [1, 2], "not known"),
    ("kasa_config", {"a": 1}, "not known"),
    ("velora_config", {"a": 1}, "not known"),
    ("monteclora_config", {"a": 1}, "not known"),
    ("use_bdlora", {"a": 1}, "not known"),
    ("use_qalora", True, "not known"),
    ("megatron_config", {"a": 1}, "not known"),
    ("megatron_core", "os", "not known"),
    ("target_parameters", ["mlp.experts"], "no linear layers"),
    ("fan_in_fan_out", True, "transposed"),
    ("ensure_weight_tying", True, "not known"),
    ("revision", "v2", "revision of the base"),
    ("task_type", "SEQ_CLS", "another task"),
    ("peft_type", "ADALORA", "expected a plain LoRA"),
    ("bias", "all", "biases"),
    ("a_setting_of_tomorrow", "on", "not known"),
]
OFF = [
    *(("loftq_config", off) for off in ({}, None)),
    *((key, None) for key in ("target_parameters", "modules_to_save", "rank_pattern")),
    ("a_setting_of_tomorrow", False),
    ("eva_config", {"rho": 2.0}),
    ("init_lora_weights", "eva"),
    ("revision", "main"),
]


def test_settings_that_change_more_than_a_lora_are_refused_with_the_reason(tmp_path: Path) -> None:
    saved(tmp_path, {})
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    first = loaded(tmp_path).sha256("a")
    for key, value, reason in CHANGED:
        path.write_text(json.dumps(plain | {key: value}))
        with pytest.raises(SettingError, match=f"{key}=.*{reason}"):
            loaded(tmp_path)
    for key, value in OFF:
        path.write_text(json.dumps(plain | {key: value}))
        assert loaded(tmp_path).sha256("a") == first, key
    path.write_text(json.dumps({k: v for k, v in plain.items() if k != "peft_type"}))
    with pytest.raises(SettingError, match="no peft_type"):
        loaded(tmp_path)
