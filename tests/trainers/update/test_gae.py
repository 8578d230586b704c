"""Advantages of tokens: MAPoRL's worked example, and estimators written the slow way round."""

from __future__ import annotations

import math

import pytest
import torch

from marlora.trainers.update.gae import explained_variance, gae, token_rewards, whiten

VALUES = torch.tensor([0.3, 0.4, 0.5])


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return gae(
        token_rewards(0.8, torch.tensor([0.5, -0.2, 0.1]), 0.002), VALUES, gamma=1.0, lam=0.95
    )


def test_a_worked_example() -> None:
    advantages, returns = example()
    assert advantages.tolist() == pytest.approx([0.464950, 0.385210, 0.299800], abs=1e-6)
    assert returns.tolist() == pytest.approx([0.764949, 0.785210, 0.799800], abs=1e-6)


def test_whitened_with_n_minus_1_below() -> None:
    white = whiten(example()[0])
    assert white.tolist() == pytest.approx([0.988360, 0.022886, -1.011246], abs=1e-5)
    assert (white * math.sqrt(3 / 2)).tolist() == pytest.approx(
        [1.210488, 0.028029, -1.238518], abs=1e-5
    )  # with n below
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert whiten(torch.full((4,), 0.3, dtype=torch.float64)).abs().max() < 1e-3, (
        "equal numbers are not blown up"
    )


def test_rewards_of_tokens() -> None:
    assert token_rewards(2.0, torch.tensor([1.0, -3.0]), 0.5).tolist() == [-0.5, 3.5]
    assert token_rewards(2.0, torch.tensor([1.0, -3.0]), 0.0).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.5, 1.0), (1.0, 1.0), (0.9, 0.0)]
)
def test_against_sums_of_all_deltas(gamma: float, lam: float) -> None:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}; equally, the lam-weighted mean of all n-step
    advantages."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values, gamma, lam)
    size, later = len(rewards), torch.cat([values[1:], torch.zeros(1, dtype=torch.float64)])
    deltas = rewards + gamma * later - values
    for t in range(size):
        assert advantages[t] == pytest.approx(
            float(sum((gamma * lam) ** n * deltas[t + n] for n in range(size - t)))
        )
        steps = [
            sum(gamma**k * rewards[t + k] for k in range(n))
            + (gamma**n * values[t + n] if t + n < size else 0.0)
            - values[t]
            for n in range(1, size - t + 1)
        ]
        weights = [(1 - lam) * lam**n for n in range(size - t - 1)] + [lam ** (size - t - 1)]
        assert advantages[t] == pytest.approx(
            float(sum(w * a for w, a in zip(weights, steps, strict=True)))
        )
        assert returns[t] == pytest.approx(float(advantages[t] + values[t]))


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])
    values = torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0])
    assert gae(rewards, values, 1.0, 0.95)[0].abs().max() == 0


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])  # variance 1.25
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((4,), 7.0), returns) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([0.0, 1.0, 2.0, 2.0]), returns) == pytest.approx(
        1 - 0.1875 / 1.25
    )
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
