"""The base models of a team: each with its tokenizer, its adapters, its optimizers and the engine
that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...agents.types import PolicySpec, SettingError
from ...rollouts.engines.base import Engine
from ...rollouts.renderer import ChatRenderer, load_tokenizer
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..model import sharding
from ..model.adapters import Adapters
from ..model.base_models import dtype_of
from ..model.local_models import local_model
from ..weight_sync.publisher import Publisher
from .optimizer_step import Optimizers
from .scalar_heads import HeadSpec, ScalarHead


@dataclass
class LearnerBase:
    """One base model. `name` is what the settings call it, `path` where it lies (a hub name may
    stay one). `heads`: scalar heads of the method, by name; they are no policies.

    `engine` and `publisher` exist on rank 0 only, once the engine is up.
    """

    name: str
    path: str
    tokens: ChatRenderer
    adapters: Adapters
    optimizers: Optimizers
    heads: dict[str, ScalarHead] = field(default_factory=dict)
    engine: Engine | None = None
    publisher: Publisher | None = None

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self.adapters.policies)


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

    `among`: the ranks to split it over, see `shard.split`; None keeps it whole. Raises
    `SettingError` naming what is missing.
    """
    from transformers import AutoModelForCausalLM

    path = local_model(name)
    tokens = ChatRenderer(load_tokenizer(path))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype_of(path, config.dtype, device), trust_remote_code=False
        )
    # a missing, torn or foreign file: transformers, safetensors and torch raise kinds of their own
    except Exception as error:
        raise SettingError(
            f"model {name!r}: cannot be loaded as a causal language model:"
            f" {str(error).splitlines()[0]}"
        ) from error
    if among is None:
        model.to(device)
    model.config.use_cache = False
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
    made = {
        spec.name: ScalarHead(adapters, spec, config, optimizers.layout)
        for spec in heads
        if (spec.base or config.model) == name
    }
    return LearnerBase(name, path, tokens, adapters, optimizers, made)
