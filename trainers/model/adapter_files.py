"""Adapter folders in PEFT's format: written, read, checked against a policy, and hashed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from ...agents.types import AdapterSpec, SettingError
from ...rollouts.files import digest_of
from ..checkpoint import write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_NAME = "base_model_name_or_path"  # of an adapter_config.json
# What an adapter_config.json may say of a plain LoRA, W x + alpha / r B A x on the base as it is
# loaded. Everything else has to be off: a setting that is not known here may change either.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    # those that leave the base alone; what they began with stands in the tensors
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "revision": (None, "", "main"),
    "megatron_core": (None, "megatron.core"),
}
_FREE = (
    *("r", "lora_alpha", "target_modules", "exclude_modules"),  # told by rank, alpha and tensors
    *(BASE_NAME, "auto_mapping", "inference_mode", "peft_version"),
    *("lora_dropout", "eva_config", "runtime_config"),  # of its training only
    *("layers_pattern", "qalora_group_size"),  # of settings that are off
)
_REASONS = {
    "init_lora_weights": "only true, false, gaussian, eva and orthogonal are known to leave the"
    " base's weights alone; after others the adapter is another policy on the base itself. PEFT"
    " makes it a plain LoRA by save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    "use_rslora": "it is scaled by alpha / sqrt(r); set use_rslora false and lora_alpha to alpha"
    " sqrt(r) in the file",
    "use_dora": "it learns magnitudes beside the LoRA",
    "lora_bias": "it learns biases beside the LoRA",
    "bias": "it changes the base's biases",
    "rank_pattern": "its layers differ in rank",
    "alpha_pattern": "its layers differ in alpha",
    "layers_to_transform": "it stands on some layers only",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "it replaces modules of the base",
    "trainable_token_indices": "it replaces token embeddings of the base",
    "target_parameters": "it stands on parameters that are no linear layers",
    "fan_in_fan_out": "its layers hold their weights transposed",
    "revision": "it was made for that revision of the base",
    "task_type": "it was made for another task",
}


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter folder.

    where: the folder and what it is for, which begins every error message.
    config: of `adapter_config.json`. tensors: by key, sorted. meta: of the tensor file.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, str]

    def check_base(self, base_name: str, base_sha256: Callable[[], str]) -> None:
        """Raise `SettingError` if the adapter was made for another base. The base is hashed only if
        the file holds its hash."""
        trained_on = self.config.get(BASE_NAME)
        if "base_sha256" in self.meta:
            if self.meta["base_sha256"] != base_sha256():
                raise SettingError(
                    f"{self.where}: made for base {trained_on!r}, whose weights differ from those"
                    f" of {base_name!r}"
                )
        elif trained_on not in (None, "", base_name):
            raise SettingError(
                f"{self.where}: made for base {trained_on!r}, the run's is {base_name!r}; if they"
                f" are the same weights, correct base_model_name_or_path in {CONFIG}"
            )

    def check_shape(
        self, adapter: AdapterSpec, parameters: Mapping[str, nn.Parameter], setting: str
    ) -> None:
        """Raise `SettingError` unless this is a plain LoRA of the policy's rank and alpha with the
        policy's tensors, all finite. `setting` is the YAML name of the policy's adapter."""
        where, config, tensors = self.where, self.config, self.tensors
        unfit = next((key for key, value in config.items() if not _is_plain(key, value)), "")
        if unfit or "peft_type" not in config:
            said = f"{unfit}={config[unfit]!r:.80}" if unfit else "no peft_type"
            reason = _REASONS.get(unfit, "it is not known to leave a LoRA's forward pass as it is")
            raise SettingError(f"{where}: {said}: expected a plain LoRA ({reason})")
        for key, value, field in (("r", adapter.r, "r"), ("lora_alpha", adapter.alpha, "alpha")):
            if config.get(key) != value:
                raise SettingError(
                    f"{where}: {key} is {config.get(key)}, the policy says {value}; set"
                    f" {setting}.{field}"
                )
        if set(tensors) != set(parameters):
            odd = sorted(set(tensors) ^ set(parameters))
            raise SettingError(
                f"{where}: {len(odd)} tensors differ in name, first {odd[0]}; set {setting}.targets"
            )
        for key, tensor in tensors.items():
            if tensor.shape != parameters[key].shape:
                raise SettingError(
                    f"{where}: {key} has shape {tuple(tensor.shape)}, expected"
                    f" {tuple(parameters[key].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise SettingError(
                    f"{where}: {key} is not finite; the file is damaged or its training diverged"
                )


def _is_plain(key: str, value: Any) -> bool:
    """Whether a setting of an `adapter_config.json` leaves the adapter a plain LoRA."""
    if key in _PLAIN:
        named = value.lower() if isinstance(value, str) and key == "init_lora_weights" else value
        return any(type(named) is type(right) and named == right for right in _PLAIN[key])
    return key in _FREE or not value


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    meta: Mapping[str, str],
) -> Path:
    """Write a plain PEFT folder: tensors by their key in PEFT's file, the LoRA's config, and the
    tensor file's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, meta)
    # targets and more of PEFT's are sets: their order differs between processes
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder


def read_adapter(folder: Path, where: str) -> SavedAdapter:
    """Read a PEFT folder. `where` begins every error message. Raises `SettingError` if a file is
    missing or damaged."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise SettingError(
                f"{where}: no {file}; expected a PEFT folder with {CONFIG} and {WEIGHTS}"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            meta = dict(file.metadata() or {})
    except Exception as error:  # safetensors and json raise many kinds, for the same cause
        raise SettingError(
            f"{where}: cannot be read ({type(error).__name__}: {error}); the file is damaged"
        ) from error
    return SavedAdapter(where, config, tensors, meta)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that may be split over ranks (then every rank has to call it), see
    `sharding.split`."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def tensors_sha256(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, dtypes, shapes and bytes; equal on every device and in every process."""
    wholes = ((name, gathered(tensor)) for name, tensor in tensors)
    return digest_of(
        (
            name,
            str(whole.dtype),
            tuple(whole.shape),
            whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, whole in wholes
    )


def base_sha256(model: nn.Module) -> str:
    """Hash of a model without its adapters; a tied weight counts once."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    names = {
        full.replace(".base_layer.", ".").removeprefix("base_model.model."): full
        for full in state
        if ".lora_" not in full
    }
    tensors = [(short, state[full]) for short, full in sorted(names.items())]
    return tensors_sha256(
        (short, t) for short, t in tensors if seen.setdefault(id(t), short) == short
    )
