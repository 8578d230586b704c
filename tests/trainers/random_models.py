"""Tiny random models of every supported family, and hand-made episodes, for the tests of this
room."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 41
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,  # pad is eos on purpose: masks must not come from ids
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 64,
    },
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 64},
}


def random_model(family: str = "llama", seed: int = 0, **settings: Any) -> Any:
    """A two-layer float32 model with weights large enough that its logits differ clearly from
    uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | settings))
    config._attn_implementation = "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def disturb(adapters: Any, std: float = 0.2, seed: int = 1) -> None:
    """Give every B a value, so that adapters differ from the base and from one another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(adapters.policies):
            for key, parameter in adapters.parameters(name).items():
                if ".lora_B." in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
