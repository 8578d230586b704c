"""
The LM head where a next token is trained, and nowhere else.

A frozen head needs no gradient of its weight, and what its input needs can be had with the logits
at hand: d log p(target) / d hidden = (onehot - p) W / temperature. So the gradient is computed in
the forward pass, chunk by chunk, times whatever comes back in the backward pass: no logits are kept
and none are computed twice. On CUDA, TRL's fused kernel does the same work without ever writing a
chunk's logits in float32. A head that learns (a LoRA on it) goes through autograd, its chunks
recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from .fused_lm_head import fused_head

Scores = tuple[torch.Tensor, torch.Tensor]

# Logits that exist at the same time. On a CPU 24 MiB of float32: what is larger the C library maps
# anew every time, and clearing its pages costs as much as the arithmetic (384 terms of 49,152
# logits in bfloat16: a third of the head's time).
LOGITS, LOGITS_ON_CPU = 2**26, 6 * 2**20


def chunk_of(vocabulary: int, device: str) -> int:
    """How many terms that is, on a device of this type."""
    return max(16, (LOGITS_ON_CPU if device == "cpu" else LOGITS) // vocabulary)


def score(
    head: Any,
    cap: float | None,
    hidden: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    *,
    entropy_grad: bool,
    chunk: int | None = None,
    fuse: bool = True,
) -> Scores:
    """log p(target) and entropy [N], float32, of terms with these hidden states [N, H], at their
    temperatures [N].

    Args:
        head: the output embedding: any module from hidden states to logits, whose `weight` is [V,
            H].
        cap: `final_logit_softcapping` of the logits.
        entropy_grad: let gradients flow through the entropy as well.
        chunk: terms whose logits exist at the same time; None: as many as `chunk_of` says.
        fuse: take TRL's kernel where it runs.
    """
    chunk = chunk or chunk_of(head.weight.shape[0], hidden.device.type)
    if not _frozen_linear(head):
        parts = [
            _checkpointed(head, cap, h, y, t, entropy_grad)
            for h, y, t in zip(
                hidden.split(chunk), target.split(chunk), temperature.split(chunk), strict=True
            )
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    fused = fused_head(hidden.device) if fuse else None
    if fused is not None:
        return _by_temperature(fused, head, cap, hidden, target, temperature, entropy_grad)
    return _Frozen.apply(
        hidden, head.weight, head.bias, target, temperature, cap, chunk, entropy_grad
    )


def logits_of(head: Any, cap: float | None, hidden: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    return torch.tanh(logits / cap) * cap if cap else logits


def of_logits(
    logits: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor, entropy_grad: bool
) -> Scores:
    """The same two numbers from logits [N, V]."""
    logps = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(1, target[:, None])[:, 0], entropy


def _frozen_linear(head: Any) -> bool:
    return type(head) in (torch.nn.Linear,) and not any(p.requires_grad for p in head.parameters())


def _checkpointed(
    head: Any,
    cap: float | None,
    hidden: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    entropy_grad: bool,
) -> Scores:
    def run(hidden: torch.Tensor) -> Scores:
        return of_logits(logits_of(head, cap, hidden), target, temperature, entropy_grad)

    return checkpoint(run, hidden, use_reentrant=False) if torch.is_grad_enabled() else run(hidden)


def _by_temperature(
    fused: Any,
    head: Any,
    cap: float | None,
    hidden: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    entropy_grad: bool,
) -> Scores:
    """TRL's kernel takes one temperature: the terms of each in turn."""
    places, parts = [], []
    for each in temperature.unique().tolist():
        mine = (temperature == each).nonzero()[:, 0]
        places.append(mine)
        parts.append(fused(hidden[mine], head.weight, head.bias, target[mine], each, cap))
    back = torch.cat(places).argsort()
    logp, entropy = (torch.cat([part[i] for part in parts])[back] for i in range(2))
    return logp, entropy if entropy_grad else entropy.detach()


class _Frozen(torch.autograd.Function):
    """See the top of this file. Saved: one [N, H] for the log-probs, another for the entropy if it
    has gradients."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, target, temperature, cap, chunk, entropy_grad
    ):
        needs_grad = hidden.requires_grad
        logp, entropy = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2)
        )
        of_logp = torch.empty_like(hidden) if needs_grad else None
        of_entropy = torch.empty_like(hidden) if needs_grad and entropy_grad else None
        for start in range(0, len(hidden), chunk):
            here = slice(start, start + chunk)
            scale, place = 1 / temperature[here, None], target[here, None]
            z = linear(hidden[here], weight, bias).float()
            if cap:
                z = z.div_(cap).tanh_()
                slope, z = 1 - z * z, z * cap
            logps = z.mul_(scale).log_softmax(-1)
            logp[here] = logps.gather(1, place)[:, 0]
            p = torch.exp(logps, out=z)
            entropy[here] = -torch.bmm(p[:, None], logps[:, :, None])[
                :, 0, 0
            ]  # no product is written down
            if of_entropy is not None:  # -d entropy / dz = p (log p + entropy)
                g = logps.add_(entropy[here, None]).mul_(p)
                of_entropy[here] = ((g.mul_(slope) if cap else g).to(weight.dtype) @ weight).mul_(
                    -scale
                )
            if of_logp is not None:  # -d logp / dz = p - onehot
                g = p.scatter_add_(1, place, -torch.ones_like(scale))
                of_logp[here] = ((g.mul_(slope) if cap else g).to(weight.dtype) @ weight).mul_(
                    -scale
                )
        ctx.save_for_backward(of_logp, of_entropy)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):  # type: ignore[no-untyped-def]
        of_logp, of_entropy = ctx.saved_tensors
        grad = of_logp * grad_logp[:, None].to(of_logp.dtype)
        if of_entropy is not None:
            grad = grad + of_entropy * grad_entropy[:, None].to(of_logp.dtype)
        return grad, None, None, None, None, None, None, None
