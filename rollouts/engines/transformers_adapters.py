"""LoRA adapters of the in-process engine: put into the model, taken out and switched, by PEFT.

PEFT walks the whole model several times to put an adapter in and again to take it out, which on a
small model costs more than decoding a step's replies. So a plain LoRA leaves its place behind, and
the next one with the same settings is copied into it. Its layers compute past PEFT's bookkeeping, a
fifth of a small model's forward pass: the same operations in the same order. torch and peft are
imported inside functions only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# settings of an adapter that its place need not share: where it came from, and its scaling
OWN = {"lora_alpha", "base_model_name_or_path", "inference_mode", "revision", "peft_version"}
_PLAIN = re.compile(r".+\.lora_[AB]\.weight")


@dataclass
class Slot:
    """A place in the model for one adapter at a time.

    name: the adapter's in PEFT. settings: of every adapter that may stand there. tensors: the
    model's own, by their key in an adapter's file; empty if no other adapter may follow.
    """

    name: str
    settings: str
    tensors: dict[str, Any]


class LoadedAdapters:
    """The adapters of one frozen model, by version. They are never merged: the base stays what it
    was.

    `model`: the bare one, wrapped by PEFT once an adapter is loaded.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self._slots: dict[str, Slot] = {}  # by version
        self._empty: list[Slot] = []
        self._count = 0  # of the slots made so far
        self._layers: list[Any] = []  # on which adapters stand
        self._brings_modules = False  # an adapter does, beside LoRA's layers
        # the version that is switched on, "" for the bare base, None if unknown
        self._active: str | None = ""

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def load(self, folder: Path) -> None:
        """Load an adapter folder, whose name becomes the version's. Raises what PEFT raises;
        nothing is loaded then."""
        from peft import PeftConfig, load_peft_weights

        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        settings = _shared_settings(config)
        tensors = load_peft_weights(str(folder), device=self.device)
        slot = next((slot for slot in self._empty if slot.settings == settings), None)
        if slot is None:
            slot = self._insert(folder, config, Slot(f"slot{self._count}", settings, {}), tensors)
        else:
            _check(folder, slot.tensors, tensors)
            self._empty.remove(slot)
            self._fill(slot, config.lora_alpha, tensors)
        self._slots[folder.name] = slot

    def _insert(self, folder: Path, config: Any, slot: Slot, tensors: Mapping[str, Any]) -> Slot:
        """Let PEFT put the adapter in, and learn whether another may follow it."""
        from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

        self._active = None
        self._count += 1
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(slot.name, config, autocast_adapter_dtype=False)
        else:
            self.model = PeftModel(self.model, config, slot.name, autocast_adapter_dtype=False)
        try:
            keys = set_peft_model_state_dict(self.model, dict(tensors), adapter_name=slot.name)
            missing = [key for key in keys.missing_keys if f".{slot.name}." in key]
            _refuse_others(folder, missing, keys.unexpected_keys)
        except Exception:
            self._delete(slot)
            raise
        self.model.eval()
        self._walk()
        inside = get_peft_model_state_dict(
            self.model, adapter_name=slot.name, save_embedding_layers=False
        )
        plain = inside.keys() == tensors.keys() and all(map(_PLAIN.fullmatch, inside))
        if plain and not config.alpha_pattern:
            slot.tensors = inside
        return slot

    def _fill(self, slot: Slot, alpha: float, tensors: Mapping[str, Any]) -> None:
        for key, tensor in tensors.items():
            slot.tensors[key].copy_(tensor)
        for layer in self._layers:
            if slot.name in layer.scaling:
                layer.lora_alpha[slot.name] = alpha
                layer.set_scale(slot.name, 1)

    def unload(self, version: str) -> None:
        """Take a version out."""
        slot = self._slots.pop(version)
        if self._active == version:
            self._active = None
        if slot.tensors:
            self._empty.append(slot)
        else:
            self._delete(slot)

    def _delete(self, slot: Slot) -> None:
        self._active = None
        others = [name for name in self.model.peft_config if name != slot.name]
        if others:
            self.model.set_adapter(others[0])  # PEFT keeps one active
            self.model.delete_adapter(slot.name)
        else:
            self.model = self.model.unload()  # the base as it was; nothing was ever merged
        self._walk()

    def _walk(self) -> None:
        """Find what PEFT has put into the model."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        self.model.requires_grad_(False)  # PEFT turns the gradients of the active adapter on
        modules = list(self.model.modules())
        self._layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._brings_modules = any(isinstance(m, AuxiliaryTrainingWrapper) for m in modules)

    def activate(self, version: str) -> None:
        """Switch to this version, or to the bare base (""), if it is not on already."""
        if self._active == version:
            return
        name = self._slots[version].name if version else ""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        if not self._brings_modules and all(_is_plain(layer, name) for layer in self._layers):
            for layer in self._layers:
                layer.forward = _plain_forward(layer, name)
        elif version:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name, inference_mode=True)
        else:
            self.model.base_model.disable_adapter_layers()
        self._active = version


def _is_plain(layer: Any, name: str) -> bool:
    """Whether this adapter adds B A x times its scaling to what the layer gives, and no more."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return False
    return name not in layer.lora_A or (
        name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and layer.lora_A[name].weight.dtype == layer.base_layer.weight.dtype
    )


def _plain_forward(layer: Any, name: str) -> Callable[[Any], Any]:
    """The layer's forward pass with this adapter, or without any if it has none of this name."""
    from torch.nn.functional import linear

    base = layer.base_layer
    if name not in layer.lora_A:
        return lambda x: base(x)
    a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return lambda x: base(x) + linear(linear(x, a), b) * scaling


def _shared_settings(config: Any) -> str:
    """What adapters that stand in one place one after the other have in common."""
    shared = {key: value for key, value in config.to_dict().items() if key not in OWN}
    return json.dumps(shared, sort_keys=True, default=sorted)


def _check(folder: Path, inside: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless these are the tensors of the place."""
    _refuse_others(folder, inside.keys() - tensors.keys(), tensors.keys() - inside.keys())
    for key, tensor in tensors.items():
        if tensor.shape != inside[key].shape:
            raise ValueError(
                f"{folder} does not fit the model: size mismatch for {key}: {list(tensor.shape)},"
                f" expected {list(inside[key].shape)}"
            )


def _refuse_others(folder: Path, missing: Collection[str], unknown: Collection[str]) -> None:
    if missing or unknown:
        raise ValueError(
            f"{folder} does not fit the model: missing {sorted(missing)[:3]}, unknown"
            f" {sorted(unknown)[:3]}"
        )
