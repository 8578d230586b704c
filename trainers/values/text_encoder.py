"""A frozen sentence encoder by name, for what looks at a query: the mean of a transformer's last
hidden states, of Euclidean norm 1, as sentence-transformers' MiniLM models make it.

    system: {class: ..., encoder: "marlora.trainers.values.text_encoder:mean_pooled(MODEL)"}

The model runs on the CPU. It is named by settings of your own only: a stranger's checkpoint that
names one is refused, since the name may fetch a model from a hub.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...agents.types import SettingError

MAX_TOKENS = 256  # of a text that are read, as all-MiniLM-L6-v2 reads


def mean_pooled(model: str) -> Callable[[str], Sequence[float]]:
    """An encoder (text -> numbers) of a model: a folder, or a hub name. Loaded at the first text,
    once per process. Raises `SettingError` then if it cannot be."""
    if not model:
        raise SettingError("encoder mean_pooled(...): expected a model's folder or hub name")

    def encode(text: str) -> list[float]:
        tokenizer, network = _loaded(model)
        ids = tokenizer(text or " ", return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
        with torch.no_grad():
            hidden = network(**ids).last_hidden_state[0].double()
        mean: torch.Tensor = hidden.mean(0)
        return (mean / mean.norm().clamp(min=1e-12)).tolist()

    return encode


@functools.lru_cache(4)
def _loaded(model: str) -> tuple[Any, Any]:
    """Tokenizer and network of a model, frozen."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModel.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SettingError(f"encoder mean_pooled({model}): cannot be loaded ({error})") from error
    return tokenizer, network.eval().requires_grad_(False)
