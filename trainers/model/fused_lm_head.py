"""TRL's fused LM head. It is no part of TRL's stable names, so it is asked for here and nowhere
else, and a test holds its signature."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)

VOCABULARY_CHUNK = 32768  # as TRL has it
SIGNATURE = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)

# (hidden [N, H], weight [V, H], bias [V] or None, targets [N], temperature, softcap or None) -> log
# p(target), entropy: [N] float32
FusedHead = Callable[
    [torch.Tensor, torch.Tensor, Any, torch.Tensor, float, float | None],
    tuple[torch.Tensor, torch.Tensor],
]


@functools.cache
def find_fused_head() -> tuple[FusedHead | None, str]:
    """TRL's kernel as a plain function, or None and why not."""
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as kernel
    except ImportError as error:
        return None, f"trl has no trl.kernels.chunked_logprob.ChunkedLogProbFunction ({error})"
    parameters = tuple(inspect.signature(kernel.forward).parameters)
    if parameters != SIGNATURE:
        return None, f"its arguments are {', '.join(parameters)}, expected {', '.join(SIGNATURE)}"

    def run(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: Any,
        targets: torch.Tensor,
        temperature: float,
        cap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy, *_ = kernel.apply(
            hidden, weight, bias, targets, temperature, VOCABULARY_CHUNK, cap, 1.0, ("entropy",)
        )
        return logp, entropy

    return run, ""


def fused_head(device: torch.device) -> FusedHead | None:
    """TRL's kernel where it has one, which is on CUDA with Triton; None elsewhere."""
    if device.type != "cuda":
        return None
    from transformers.utils import is_triton_available

    return _logged_fused_head() if is_triton_available() else None


@functools.cache
def _logged_fused_head() -> FusedHead | None:
    """`find_fused_head`, with one warning if there is none."""
    head, why = find_fused_head()
    if head is None:
        log.warning("TRL's fused LM head is not used: %s", why)
    return head
