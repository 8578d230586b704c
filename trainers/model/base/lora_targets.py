"""Linear layers that a LoRA may stand on, by the last parts of their names."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

# PEFT refuses these in models of states, whose kernels read the weights past the layer
_READ_BY_KERNELS = {"out_proj", "conv1d"}
_STATE_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the output head: what a policy may
    target. Layers of a kind of their own (routers) are none, nor are names that PEFT refuses or
    takes for a model's experts."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain, other = set(), set()
    for full, module in model.named_modules():
        if ".lora_" in full or not full:
            continue
        name = full.removesuffix(".base_layer").rsplit(".", 1)[-1]
        if is_plain_linear(module) and module is not head:
            plain.add(name)
        elif not isinstance(module, LoraLayer):
            other.add(name)
    return sorted(name for name in plain - other if not refused(model, name))


def is_plain_linear(module: nn.Module) -> bool:
    """Is it y = Wx + b and nothing else? A LoRA beside any other layer would be another model."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def refused(model: Any, name: str) -> str:
    """Why PEFT puts no LoRA on linear layers of this name in this model; "" if it does.

    transformers keeps the experts of a layer in one tensor, and PEFT takes the names that they had
    before for that tensor, also where shared experts and dense layers still have them.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in _STATE_MODELS and name in _READ_BY_KERNELS:
        return f"PEFT refuses it in {kind} models"
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(r=1, target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it is fused with another one
        return f"PEFT takes it for the experts of {kind} models"
    if config.target_parameters or name not in config.target_modules:
        return f"PEFT takes it for the experts of {kind} models"
    return ""
