"""One frozen base model, one named LoRA per policy.

All adapters are created before any optimizer, each seeded by its own policy's name. The base never
changes: nothing is merged into it, and `base_sha256` shows it. Parameters are found by exact
adapter name, and after every PEFT call `requires_grad` is set back to the declared table (trainable
policies True, all the rest False), because PEFT flips it when adapters are switched, loaded or
disabled.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ...agents.seeds import derive_seed
from ...agents.types import BASE, AdapterSpec, PolicySpec, SettingError, nearest
from ...rollouts.engines.transformers_exactness import fix_rotary
from ..warm_start import init_folder
from .adapter_files import BASE_NAME, base_sha256, read_adapter, tensors_sha256, write_adapter
from .base.lora_targets import is_plain_linear, linear_names, refused
from .base.recomputation import recompute_activations

_LORA = re.compile(r"^(?P<module>.+\.lora_[AB])\.(?P<adapter>[^.]+)\.weight$")


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that take part in a forward pass now; () if they are off or there are
    none."""
    layer = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)


class Adapters:
    """The adapters of all policies on one shared base.

    Args:
        base_model: a causal language model of any dtype; it is frozen and wrapped in place.
        policies: those without an adapter (`base`, outside models) are skipped.
        seed: of the run; a fresh adapter depends on it and on its policy's name only, not on order
            or device.
        dtype: of adapter weights; they are float32 on a bfloat16 base too, so that small updates
            are not rounded away.
        base_name: written into saved folders as the base's name; default is the one the model was
            loaded by.
        read_sha256: reads the weights that a base on torch's meta device stands for, and hashes
            them.

    `model` is the wrapped model; give it to `token_logprobs` inside `active(name)`. On a base
    without weights (`weightless`: it lies on torch's meta device, see `base_on_meta`) adapters are
    read, hashed and saved as on any other, and nothing is computed with them. Raises
    `SettingError` for names, targets or `init` folders that cannot be used.
    """

    def __init__(
        self,
        base_model: Any,
        policies: Sequence[PolicySpec],
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        base_name: str = "",
        read_sha256: Callable[[], str] | None = None,
    ) -> None:
        self.policies = {p.name: p for p in policies if p.has_adapter}
        _check_names(policies)
        fix_rotary(base_model)
        self.base_name = base_name or getattr(base_model, "name_or_path", "")
        self.weightless = read_sha256 is not None
        self._read_sha256 = read_sha256 or self.base_sha256
        self._made_for: dict[str, str] = {}  # hash of the base that a file read names, by policy
        configs = {
            name: _config(base_model, spec, self.base_name)
            for name, spec in sorted(self.policies.items())
        }
        self.aside: dict[str, PolicySpec] = {}  # adapters that no agent speaks with, see `add`
        self.seed, self.dtype = seed, dtype
        self.model: Any = base_model.requires_grad_(False)
        for name, config in configs.items():
            self._insert(name, config)
        for name in self.policies:
            self.restart(name)
        self.declare()

    def restart(self, name: str) -> None:
        """Give a policy's adapter what its `init` says, whatever it has learnt."""
        self._fresh(name)
        self._made_for.pop(name, None)
        if self.policies[name].init != "fresh":
            self.load(name, init_folder(self.policies[name].init))

    def add(self, name: str, shape: AdapterSpec) -> None:
        """One more fresh adapter, which learns but is no policy: it is not in `policies` nor in
        `trainable`, so nothing publishes it.

        Its name has to hold an `@`, which no policy's may. To be called before any optimizer is
        made.
        """
        if "@" not in name or "." in name or name in self.aside:
            raise ValueError(f"adapter {name!r}: a name of its own with an '@' and no dot expected")
        spec = PolicySpec(name, adapter=shape)
        config = _config(self.model, spec, self.base_name)
        self.aside[name] = spec
        self._insert(name, config)
        self._fresh(name)
        self.declare()

    def _insert(self, name: str, config: LoraConfig) -> None:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Adapter name .* should not be contained in the prefix"
            )
            warnings.filterwarnings(
                "ignore", message="The PEFT config's `base_model_name_or_path` was renamed"
            )
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = get_peft_model(self.model, config, adapter_name=name)
            if self.weightless:  # PEFT puts an adapter where its base is
                for layer in self.model.modules():
                    if isinstance(layer, LoraLayer) and name in layer.lora_A:
                        layer.lora_A[name].to_empty(device="cpu")
                        layer.lora_B[name].to_empty(device="cpu")
        self.refresh()

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the policies that learn, sorted."""
        return tuple(sorted(name for name, spec in self.policies.items() if spec.trainable))

    @property
    def num_embeddings(self) -> int:
        """How many tokens the base has an embedding of."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's tensors by the key they have in a saved file, sorted. Optimizers take their
        lists from here."""
        self._spec(name)
        return dict(self._tensors.get(name, {}))

    @contextlib.contextmanager
    def active(self, name: str) -> Iterator[Any]:
        """The model with this policy's adapter on, or with all off for `base`. May be nested.

        Backward has to run inside too: with gradient checkpointing it computes the forward again.
        """
        if name != BASE:
            self._spec(name)
        before = active_adapters(self.model)
        try:
            self._switch((name,) if name != BASE else ())
            yield self.model
        finally:
            self._switch(before)

    def declare(self) -> None:
        """Set `requires_grad` of every parameter to the declared table."""
        for parameter, learns in self._table.values():
            if parameter.requires_grad != learns:
                parameter.requires_grad_(learns)

    def check(self) -> None:
        """Raise RuntimeError if any `requires_grad` differs from the declared table, or if the
        model holds other adapter tensors than `parameters` gives."""
        wrong = []
        for full, parameter in self.model.named_parameters():
            known, learns = self._table.get(full, (parameter, False))
            if parameter.requires_grad != learns or (parameter is not known and _LORA.match(full)):
                wrong.append(full)
        if wrong:
            raise RuntimeError(
                f"requires_grad of {len(wrong)} parameters differs from the policies' table, or"
                f" they were replaced, first: {wrong[0]}"
            )

    def checkpoint_activations(self) -> None:
        """Turn gradient checkpointing on, see `recompute_activations`."""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        recompute_activations(self.model, base)

    @property
    def recomputes(self) -> bool:
        """Are activations computed again in the backward pass?"""
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return bool(getattr(base, "is_gradient_checkpointing", False))

    def save(self, name: str, folder: str | Path) -> Path:
        """Write a plain PEFT folder that peft and vLLM load. The hash of the base goes into the
        file's metadata, where it is known: without the base's weights, of adapters whose own file
        named it."""
        tensors = {key: p.detach().cpu().contiguous() for key, p in self.parameters(name).items()}
        config = self.model.peft_config[name].to_dict()
        config |= {"inference_mode": True, BASE_NAME: self.base_name or None}
        base = self._made_for.get(name, "") if self.weightless else self.loaded_sha256
        meta = {"policy": name} | ({"base_sha256": base} if base else {})
        return write_adapter(Path(folder), tensors, config, meta)

    def load(self, name: str, folder: str | Path) -> None:
        """Read weights saved by `save` or by peft into this policy's adapter.

        Raises `SettingError` if a file is missing, the adapter was made for another base, has
        another rank, alpha or kind, or its tensors differ in name or shape or are not finite;
        nothing is changed then. Without the base's weights, an adapter that names this base is
        made for it; for any other name the weights are read once and hashed.
        """
        spec, parameters = self._spec(name), self.parameters(name)
        saved = read_adapter(Path(folder), f"policy {name!r}: adapter in {folder}")
        if not (self.weightless and saved.config.get(BASE_NAME) == self.base_name):
            saved.check_base(self.base_name, lambda: self.loaded_sha256)
        setting = f"policies.{name}.adapter" if name in self.policies else "the head's adapter"
        saved.check_shape(spec.adapter, parameters, setting)
        with torch.no_grad():
            for key, tensor in saved.tensors.items():
                parameters[key].copy_(tensor)
        self._made_for[name] = saved.meta.get("base_sha256", "")
        self.declare()

    def copy(self, name: str, source: Adapters) -> None:
        """Take this policy's tensors from its adapter on another copy of the base."""
        tensors = source.parameters(name)
        with torch.no_grad():
            for key, parameter in self.parameters(name).items():
                parameter.copy_(tensors[key])

    def sha256(self, name: str) -> str:
        """Hash of the adapter's tensors."""
        return tensors_sha256(self.parameters(name).items())

    def base_sha256(self) -> str:
        """Hash of the base's parameters and persistent buffers as they are now; equal before and
        after wrapping, and however they are split over ranks (then every rank has to call it)."""
        return base_sha256(self.model)

    @functools.cached_property
    def loaded_sha256(self) -> str:
        """`base_sha256` when it was first asked for: what saved adapters are stamped with."""
        return self._read_sha256()

    def refresh(self) -> None:
        """To be called when parameters were replaced by others of the same names, or added."""
        for kept in ("_table", "_tensors", "_layers"):
            self.__dict__.pop(kept, None)

    def is_trained(self, name: str) -> bool:
        """False while B is zero: the adapter is the bare base to the last bit."""
        return any(bool(p.any()) for key, p in self.parameters(name).items() if ".lora_B." in key)

    @contextlib.contextmanager
    def amplified(self, name: str, factor: float) -> Iterator[None]:
        """The adapter's scaling times `factor`, as if `lora_alpha` were; `base` has none."""
        layers = [layer for layer in self._layers if name in layer.scaling]
        before = [layer.scaling[name] for layer in layers]
        try:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling[name] = scaling * factor
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling[name] = scaling

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # kept, because walking a model costs as much as a small forward pass

    @functools.cached_property
    def _table(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """Every parameter and whether it is declared to learn."""
        return {
            full: (parameter, self._declared(full))
            for full, parameter in self.model.named_parameters()
        }

    @functools.cached_property
    def _tensors(self) -> dict[str, dict[str, nn.Parameter]]:
        """`parameters` of every adapter."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        for full, (parameter, _) in self._table.items():
            if match := _LORA.match(full):
                found.setdefault(match["adapter"], {})[f"{match['module']}.weight"] = parameter
        return {name: dict(sorted(tensors.items())) for name, tensors in found.items()}

    @functools.cached_property
    def _layers(self) -> list[LoraLayer]:
        """Those that adapters stand on."""
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def _spec(self, name: str) -> PolicySpec:
        spec = self.policies.get(name) or self.aside.get(name)
        if spec is None:
            raise SettingError(
                f"policy {name!r} has no adapter here; {nearest(name, self.policies)}"
            )
        return spec

    def _declared(self, full: str) -> bool:
        match = _LORA.match(full)
        spec = (
            (self.policies.get(match["adapter"]) or self.aside.get(match["adapter"]))
            if match
            else None
        )
        return spec is not None and spec.trainable

    def _switch(self, names: tuple[str, ...]) -> None:
        if names == active_adapters(self.model):
            return
        for layer in self._layers:
            layer.enable_adapters(bool(names))
            if names:
                layer.set_adapter(names[0], inference_mode=True)
        self.declare()

    def _fresh(self, name: str) -> None:
        """Kaiming-uniform A and zero B, as PEFT does, but every tensor from a seed of its own
        (drawn on the CPU)."""
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.to(self.dtype)
        with torch.no_grad():
            for key, parameter in self.parameters(name).items():
                if ".lora_B." in key:
                    parameter.zero_()
                    continue
                generator = torch.Generator().manual_seed(
                    derive_seed(self.seed, "adapter", name, key)
                )
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(
                    torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                )


def _check_names(policies: Sequence[PolicySpec]) -> None:
    names = [p.name for p in policies]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"policies: two policies are named {name!r}; names are unique")
        if not name or not all(c.isalnum() or c in "_-" for c in name):
            raise SettingError(
                f"policy name {name!r}: letters, digits, '_' and '-' expected (it names files and"
                " adapters)"
            )
        if hasattr(nn.ModuleDict(), name):
            raise SettingError(
                f"policy name {name!r}: torch uses this word itself; choose another, such as"
                f" '{name}_agent'"
            )


def _config(base: nn.Module, spec: PolicySpec, base_name: str) -> LoraConfig:
    known, targets = linear_names(base), list(spec.adapter.targets)
    setting = f"policies.{spec.name}.adapter.targets"
    if not known:
        raise SettingError(
            f"{setting}: {type(base).__name__} has no torch.nn.Linear that a LoRA can stand on;"
            " expected a base whose layers are, choose another model"
        )
    if len(targets) > 1 and "all-linear" in targets:
        raise SettingError(
            f"{setting}: {targets}: 'all-linear' names every linear layer; give it alone, or only"
            f" names: {', '.join(known)}"
        )
    if targets == ["all-linear"]:
        targets = known
    modules = {n: m for n, m in base.named_modules()}
    for target in targets:
        matches = [m for n, m in modules.items() if n == target or n.endswith(f".{target}")]
        linear = all(isinstance(m, LoraLayer) or is_plain_linear(m) for m in matches)
        why = refused(base, target.rsplit(".", 1)[-1])
        if not matches or not linear or why:
            raise SettingError(
                f"{setting}: {target!r} is not a linear layer of"
                f" {type(base).__name__}{f' to stand on ({why})' if why else ''}; its linear"
                f" layers: {', '.join(known)} (or all-linear)"
            )
    alpha = (
        int(spec.adapter.alpha) if float(spec.adapter.alpha).is_integer() else spec.adapter.alpha
    )
    return LoraConfig(
        r=spec.adapter.r,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=spec.adapter.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name or None,
    )
