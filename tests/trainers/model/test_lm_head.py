"""The head's log-probs, entropies and gradients against plain autograd over full logits; TRL's
kernel against ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marlora.trainers.model.fused_lm_head import find_fused_head, fused_head
from marlora.trainers.model.lm_head import _by_temperature, _frozen_linear, score

N, H, V = 11, 8, 23


def made(bias: bool = False, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias).to(dtype).requires_grad_(False)
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, V, (N,)), torch.tensor([0.7, 1.3, 1.0] * 4)[:N]


def plain(head, hidden, target, temperature, cap):
    """Full logits in float32."""
    logits = hidden.float() @ head.weight.float().T + (
        0 if head.bias is None else head.bias.float()
    )
    logits = torch.tanh(logits / cap) * cap if cap else logits
    logps = torch.log_softmax(logits / temperature[:, None], -1)
    return logps[torch.arange(N), target], -(logps.exp() * logps).sum(-1)


def gradient(scores, hidden, entropy_grad):
    loss = (scores[0] * torch.arange(N)).sum() + (0.3 * scores[1].sum() if entropy_grad else 0)
    return torch.autograd.grad(loss, hidden)[0].float()


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_scores_and_gradients_are_those_of_full_logits(learns, bias, cap, entropy_grad):
    head, hidden, target, temperature = made(bias)
    head.requires_grad_(learns)  # a head that learns goes through autograd
    ours = score(head, cap, hidden, target, temperature, chunk=4, entropy_grad=entropy_grad)
    right = plain(head, hidden, target, temperature, cap)
    for mine, his in zip(ours, right, strict=True):
        assert torch.allclose(mine, his, atol=1e-6)
    assert ours[1].requires_grad is entropy_grad
    if learns:
        (weight,) = torch.autograd.grad(ours[0].sum(), head.weight, retain_graph=True)
        assert torch.allclose(
            weight,
            torch.autograd.grad(right[0].sum(), head.weight, retain_graph=True)[0],
            atol=1e-5,
        )
    mine, his = (gradient(x, hidden, entropy_grad) for x in (ours, right))
    assert (mine - his).norm() < 1e-6 * his.norm()


def test_half_precision_keeps_the_gradient_of_a_likely_token():
    """log p near 0: the gradient is a small difference, which would drown if the token's row and
    the mean were rounded apart."""
    head, hidden, _, temperature = made(dtype=torch.bfloat16)
    with torch.no_grad():
        hidden.mul_(8)
    target = (hidden.float() @ head.weight.float().T).argmax(-1)
    logp, entropy = score(head, None, hidden, target, temperature, chunk=100, entropy_grad=False)
    right = plain(head, hidden, target, temperature, None)
    assert right[0].max() > -0.05
    assert logp.dtype == entropy.dtype == torch.float32
    mine, his = (gradient(x, hidden, False) for x in ((logp, entropy), right))
    assert (mine - his).norm() < 1e-2 * his.norm()


def test_nothing_of_the_size_of_the_logits_is_kept():
    head, hidden, target, temperature = made()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        score(head, None, hidden, target, temperature, chunk=4, entropy_grad=False)[
            0
        ].sum().backward()
    assert max(kept) == N * H and head.weight.grad is None
    with torch.no_grad():
        assert not score(head, None, hidden, target, temperature, chunk=4, entropy_grad=False)[
            0
        ].requires_grad
    assert not _frozen_linear(nn.Sequential(head)) and _frozen_linear(head)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_kernel_of_trl_is_there_and_means_the_same(cap):
    """Its name and arguments are not TRL's stable ones. On a CPU it runs without Triton: slower,
    but the same numbers."""
    fused, why = find_fused_head()
    assert fused is not None, why
    head, hidden, target, temperature = made(bias=True)
    theirs = _by_temperature(fused, head, cap, hidden, target, temperature, True)
    ours = score(head, cap, hidden, target, temperature, chunk=100, entropy_grad=True)
    for mine, his in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, his, atol=1e-5)
    mine, his = (gradient(x, hidden, True) for x in (ours, theirs))
    assert (mine - his).norm() < 1e-5 * his.norm()
    assert fused_head(torch.device("cpu")) is None, (
        "there it scores in tiles that cost more than ours"
    )
