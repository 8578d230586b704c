"""Gradient checkpointing of a base: activations computed again in the backward pass, with the same
values.

transformers recomputes in layers that are in training mode, so these are, and nothing inside them:
routers and dropout modules compute as when they are served. What a layer itself drops, by
`F.dropout(training=self.training)`, is set to 0. It is asked at once whether such passes are those
in evaluation mode, because the log-probs of a dropout pass are not the served ones.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ....agents.types import SettingError
from ....rollouts.engines.transformers_exactness import difference, probe_words, rounding_noise

_DROP = re.compile(r"drop", re.I)  # in names of numbers


def recompute_activations(model: Any, base: Any) -> None:
    """Turn gradient checkpointing on, always non-reentrant: the reentrant kind loses LoRA
    gradients. Raises `SettingError` if the base cannot do it, or its passes would differ.

    `model`: `base` or its PEFT wrapper; only its layers are left in training mode.
    """
    name, instead = type(base).__name__, "set gradient_checkpointing to false"
    try:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, AttributeError) as error:
        raise SettingError(
            f"gradient_checkpointing: {name} has none ({str(error).splitlines()[0]}); {instead}"
        ) from error
    model.eval()
    right = _logits(base)
    noise = rounding_noise(base, right, lambda: _logits(base))
    switch_off_dropout(base)
    for module in base.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
    for _ in range(2):
        if off := difference(_logits(base), right, noise):
            raise SettingError(
                f"gradient_checkpointing: passes of {name} in training mode are not those that are"
                f" served, although its dropout is off ({off}); {instead}"
            )


def switch_off_dropout(base: nn.Module) -> None:
    """Set every probability of dropping to 0, in modules and configurations."""
    for module in base.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            _zero(config)
            for part in vars(config).values():
                if hasattr(part, "model_type"):
                    _zero(part)


def _zero(owner: Any) -> None:
    for name, value in list(vars(owner).items()):
        if isinstance(value, float) and value and _DROP.search(name):
            setattr(owner, name, 0.0)


@torch.no_grad()
def _logits(base: Any) -> torch.Tensor:
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([probe_words(base, 16)], device=device)
    return base(input_ids=ids, use_cache=False).logits[0].float()
