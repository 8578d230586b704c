"""Models of known shapes with random weights, which need no hub and no file, and the work that a
step on them cannot do without."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...agents.types import AdapterSpec, SettingError, nearest
from ..batching.batches import pack
from ..batching.samples import TrainingSequence
from ..model.base.lora_targets import linear_names
from ..model.local_models import local_model
from ..testbeds.tiny import tiny_network, tiny_random_model, tiny_tokenizer


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40960,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},  # `tiny.tiny_network`
    "135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
}
LORA = AdapterSpec(r=16, alpha=32.0, targets=("all-linear",))
ENTRANCE = re.compile(
    r"\blayers\.0\.self_attn\.[qkv]_proj$"
)  # what reads the embeddings, in every geometry above


def check_size(size: str) -> None:
    if size not in SIZES:
        raise SettingError(f"--size {size!r}: no such geometry; {nearest(size, SIZES)}")


def network(size: str, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A causal language model of this geometry with random weights, on its device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_size(size)
    if size == "tiny":
        return tiny_network().to(device, dtype)
    fields = dict(SIZES[size])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    return model


def served_folder(size: str, folder: Path, device: str = "cpu") -> str:
    """A model that an engine can load: weights and a tokenizer that fits them. Those of Qwen3's
    geometries are random, drawn on `device`, in bfloat16."""
    check_size(size)
    if size == "tiny":
        return str(tiny_random_model(folder / "model", hidden_size=128, layers=3))
    if size == "135m":
        return local_model("smollm2-135m")
    model = network(size, device, torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(folder / "model")
    byte_tokenizer(SIZES[size]["vocab_size"]).save_pretrained(folder / "model")
    return str(folder / "model")


def byte_tokenizer(vocabulary: int) -> Any:
    """`tiny_tokenizer`, whose vocabulary is filled up to this size: text is read as bytes, and any
    token that a random model samples has a text."""
    from tokenizers import Tokenizer

    tokenizer = tiny_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"] |= {f"<{n}>": n for n in range(len(tokenizer), vocabulary)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    return tokenizer


@dataclass(frozen=True)
class Needed:
    """What a step has to compute: `unique` tokens of the prefix trees, `pairs` of a token and one
    it sees, `terms` that are trained.

    After them the counts of the model: `linear` parameters that every token goes through, `head`
    parameters, `adapter` parameters of one LoRA, `entrance`: those of either that read the
    embeddings, `layers`, and `width` of all heads of a layer together.
    """

    unique: int
    pairs: int
    terms: int
    linear: int
    head: int
    adapter: int
    entrance: int
    layers: int
    width: int

    @property
    def flops(self) -> float:
        """Of a forward and backward pass with a frozen base: (4 N + 6 A - 2 E) U + 14 L d P + 4 H
        M, where A is the adapter's parameters and E those at the entrance: the embeddings are
        frozen, so their gradient is not computed.

        The backward pass has no weight gradients but the adapter's; the head is not computed again.
        The last layer counts in full, though tokens without a term need no more of it than keys and
        values: no way of the bench leaves the rest out.
        """
        through = (4 * self.linear + 6 * self.adapter - 2 * self.entrance) * self.unique
        return through + 14 * self.layers * self.width * self.pairs + 4 * self.head * self.terms


def needed(model: Any, samples: Sequence[TrainingSequence]) -> Needed:
    """Of one policy's samples under the base `model` (not wrapped) with `LORA`."""
    unique = pairs = terms = 0
    for batch in pack(samples, max_tokens=10**9, layout="shared"):
        seen = batch.attention_mask
        unique += int(seen.sum())
        pairs += int((batch.position_ids + 1)[seen].sum())
        terms += batch.num_terms
    modules = {
        name: m
        for name, m in model.named_modules()
        if name.rpartition(".")[2] in linear_names(model)
    }
    sizes = [(m.in_features, m.out_features) for m in modules.values()]
    first = [
        (m.in_features, m.out_features) for name, m in modules.items() if ENTRANCE.search(name)
    ]
    config = model.config
    heads = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return Needed(
        unique,
        pairs,
        terms,
        linear=sum(i * o for i, o in sizes),
        head=config.vocab_size * config.hidden_size,
        adapter=LORA.r * sum(i + o for i, o in sizes),
        entrance=sum(i * (o + LORA.r) for i, o in first),
        layers=config.num_hidden_layers,
        width=heads,
    )
