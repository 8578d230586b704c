"""A base model in the trainer: with its weights where something learns on it, without them where
everything is frozen."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...agents.types import PolicySpec, SettingError
from ...rollouts.engines.transformers_exactness import fix_rotary
from ...rollouts.renderer import ChatRenderer, base_renderer
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..model import sharding
from ..model.adapter_files import base_sha256
from ..model.adapters import Adapters
from ..model.base_models import base_on_meta, dtype_of
from ..model.local_models import local_model
from .optimizer_step import Optimizers
from .scalar_heads import HeadSpec, ScalarHead


@dataclass
class LearnerBase:
    """One base model with all that learns on it.

    `name`: what the settings call it. `path`: its folder, or a hub name. `heads`: the method's
    scalar heads by name; they are no policies.
    """

    name: str
    path: str
    tokens: ChatRenderer
    adapters: Adapters
    optimizers: Optimizers
    heads: dict[str, ScalarHead] = field(default_factory=dict)

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self.adapters.policies)

    @property
    def weightless(self) -> bool:
        """Whether the base's weights are not loaded here, because nothing learns on it."""
        return self.adapters.weightless


def trained_bases(
    groups: Mapping[str, Sequence[PolicySpec]], heads: Sequence[HeadSpec], default: str
) -> set[str]:
    """The bases, by name, on which a policy or a scalar head learns. The others are served and
    need no weights in the trainer.

    Args:
        groups: the policies of every base, see `group_by_base`.
        heads: of the method; one that names no base stands on `default`.

    Raises `SettingError` for a head on a base where no policy stands.
    """
    learning = {
        name for name, specs in groups.items() if any(s.has_adapter and s.trainable for s in specs)
    }
    for head in heads:
        base = head.base or default
        if base not in groups:
            known = f"expected one of {', '.join(groups)}" if groups else "all are outside models"
            raise SettingError(
                f"model: the method trains the head {head.name!r} on base {base!r}, where no policy"
                f" of the team stands; {known}"
            )
        learning.add(base)
    return learning


def load_base(
    name: str,
    policies: Sequence[PolicySpec],
    config: RunConfig,
    device: torch.device,
    heads: Sequence[HeadSpec] = (),
    among: Ranks | None = None,
) -> LearnerBase:
    """Load model and tokenizer and create every adapter, and those of `heads` that stand on this
    base; then the optimizers.

    `among`: the ranks to split it over, see `sharding.split`; None keeps it whole. Raises
    `SettingError` naming what is missing.
    """
    path = local_model(name)
    tokens = base_renderer(path, config.template_variables())
    model = _read_weights(name, path, dtype_of(path, config.dtype, device))
    if among is None:
        model.to(device)
    model.config.use_cache = False
    fix_rotary(model, config.max_model_len)
    adapters = Adapters(model, policies, seed=config.seed, base_name=path)
    for policy in adapters.policies.values():
        if policy.adapter.dropout and policy.trainable:
            raise SettingError(
                f"policies.{policy.name}.adapter.dropout: 0 expected; log-probs of a dropout pass"
                " are not the served ones"
            )
    if among is not None:
        sharding.split(adapters, among)
    optimizers = Optimizers(adapters, config)
    scalar_heads = {
        spec.name: ScalarHead(adapters, spec, config, optimizers.layout)
        for spec in heads
        if (spec.base or config.model) == name
    }
    return LearnerBase(name, path, tokens, adapters, optimizers, scalar_heads)


def frozen_base(
    name: str, policies: Sequence[PolicySpec], config: RunConfig, device: torch.device
) -> LearnerBase:
    """A base on which nothing learns: its tokenizer, and its frozen adapters on a model without
    weights. Without adapters not even its shapes are read.

    Raises `SettingError` for adapters that do not fit the base.
    """
    path = local_model(name)
    tokens = base_renderer(path, config.template_variables())

    def read_sha256() -> str:
        return base_sha256(_read_weights(name, path, dtype_of(path, config.dtype, device)))

    shapes = (
        base_on_meta(path, dtype_of(path, config.dtype, device))
        if any(policy.has_adapter for policy in policies)
        else torch.nn.Module()
    )
    adapters = Adapters(shapes, policies, seed=config.seed, base_name=path, read_sha256=read_sha256)
    return LearnerBase(name, path, tokens, adapters, Optimizers(adapters, config))


def _read_weights(name: str, path: str, dtype: torch.dtype) -> Any:
    """The model in the CPU's memory. Raises `SettingError` if it is none."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    # a missing, torn or foreign file: transformers, safetensors and torch raise kinds of their own
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # the disk that the progress is written to is full; the model may be right
        raise SettingError(
            f"model {name!r}: cannot be loaded as a causal language model:"
            f" {str(error).splitlines()[0]}"
        ) from error
