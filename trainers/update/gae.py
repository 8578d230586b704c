"""Advantages of single tokens: rewards per token, generalised advantage estimation, whitening. Pure
functions on one-dimensional tensors.

Generalised advantage estimation: arXiv:1506.02438, equations 11 and 16. A token is an action; the
state before it is the sequence so far, and its value is the critic's prediction there.
"""

from __future__ import annotations

import math

import torch


def token_rewards(score: float, kl: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """[T] rewards of one turn's tokens: -kl_coef x (log p - log p of the reference) each, and the
    turn's score with the last one."""
    rewards = -kl_coef * kl.double()
    rewards[-1] += score
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [T], returns [T]) in float64 of a sequence that ends after its last token, where
    the value is 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t,
    the critic's target.
    """
    reversed_advantages, after, value_after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        after = reward + gamma * value_after - value + gamma * lam * after
        value_after = value
        reversed_advantages.append(after)
    advantages = torch.tensor(reversed_advantages[::-1], dtype=torch.float64)
    return advantages, advantages + values.double()


def whiten(advantages: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 (n - 1 below). One number alone becomes 0."""
    if advantages.numel() < 2:
        return torch.zeros_like(advantages)
    variance, mean = torch.var_mean(advantages)
    return (advantages - mean) / torch.sqrt(variance + 1e-8)


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a critic that knows all, 0 for one that says
    the same of everything, below 0 for one that is worse than that. NaN where the returns are all
    alike."""
    spread = float(returns.double().var(correction=0)) if returns.numel() else 0.0
    return (
        1 - float((returns.double() - values.double()).var(correction=0)) / spread
        if spread > 0
        else math.nan
    )
