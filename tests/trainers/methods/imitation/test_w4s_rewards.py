"""W4S's rewards and weights in the sheet's numbers (U1 to U5), and what a fit of them comes to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError
from marlora.trainers.methods.imitation.w4s_rewards import (
    DesignRewardConfig,
    RewardedChat,
    RewardWeightConfig,
    design_reward,
    reward_weights,
    turn_weights,
)
from marlora.trainers.update.losses.nll import weighted_nll

pytestmark = pytest.mark.usefixtures("one_thread")


def weighing(**settings: Any) -> RewardWeightConfig:
    return RewardWeightConfig(**settings)


@pytest.mark.parametrize(
    ("accuracy", "best", "previous", "reward"),
    [
        (0.62, 0.55, 0.50, 1.0),
        (0.52, 0.55, 0.50, 0.5),
        (0.50, 0.55, 0.50, 0.0),
        (0.25, 0.20, 0.10, 0.9),
        (0.25, 0.55, 0.20, 0.4),
        (0.20, 0.55, 0.50, -0.1),
    ],
)
def test_the_reward_table(accuracy: float, best: float, previous: float, reward: float) -> None:
    """U3."""
    assert design_reward(accuracy, best, previous, DesignRewardConfig()) == pytest.approx(reward)


def test_the_continuous_reward() -> None:
    """U4."""
    config = DesignRewardConfig(reward="continuous")
    values = [design_reward(a, b, 0.5, config) for a, b in ((0.62, 0.55), (0.5, 0.55), (0.1, 0.0))]
    assert values == pytest.approx([0.127273, -0.090909, 1.0], abs=1e-6)


def test_weights_are_exponentials_of_rewards() -> None:
    """U1; normalised they keep their ratios and have a mean of 1."""
    rewards = [1.0, 0.9, 0.5, 0.4, 0.0, -0.1]
    plain = reward_weights(rewards, weighing(normalize_weights=False), 0)
    right = [12.182494, 9.487736, 3.490343, 2.718282, 1.0, 0.778801]
    assert plain == pytest.approx(right, abs=1e-6)
    normal = reward_weights(rewards, weighing(), 0)
    assert math.fsum(normal) == pytest.approx(6)
    assert [w / normal[4] for w in normal] == pytest.approx(right, abs=1e-6)


def test_controls_weigh_all_alike_or_at_random() -> None:
    rewards = [1.0, 0.5, 0.0, 0.0]
    assert reward_weights(rewards, weighing(weights="constant"), 0) == [1.0] * 4
    right, dealt = (reward_weights(rewards, weighing(weights=w), 3) for w in ("reward", "random"))
    assert sorted(dealt) == sorted(right) and dealt != right
    assert dealt == reward_weights(rewards, weighing(weights="random"), 3)
    assert reward_weights([], weighing(), 0) == []


def test_weights_beyond_a_number_are_refused_unless_they_are_normalised() -> None:
    with pytest.raises(SettingError, match=r"tau: exp\(1 / 0.001\).*normalize_weights: true"):
        reward_weights([1.0, 0.0], weighing(tau=0.001, normalize_weights=False), 0)
    assert reward_weights([1.0, 0.0], weighing(tau=0.001), 0) == pytest.approx([2.0, 0.0])


def loss(losses: list[list[float]], rewards: list[float], **settings: Any) -> float:
    """The loss of one update on chats of one turn with these losses per token."""
    keys = [(f"talk {k}", 0, 0) for k in range(len(losses))]
    lengths = {key: len(own) for key, own in zip(keys, losses, strict=True)}
    chats = [RewardedChat((key,), reward) for key, reward in zip(keys, rewards, strict=True)]
    weights = turn_weights(chats, lengths, weighing(**settings), 0)
    logp = torch.tensor([-x for own in losses for x in own], dtype=torch.float64)
    weight = torch.tensor([weights[key] for key in keys for _ in range(lengths[key])])
    return weighted_nll(logp, weight.double(), float(len(logp)))[0].item()


@pytest.mark.parametrize("even", [True, False])
def test_the_loss_is_the_mean_of_weighted_cross_entropies(even: bool) -> None:
    """U2: means over tokens of 1.2, 0.8 and 2.0, of programs as long as one another or not."""
    losses = [[1.0, 1.4], [0.8, 0.8], [1.5, 2.5]]
    if not even:
        losses[1] = [0.8]
        losses[2] = [1.0, 2.0, 3.0, 2.0]
    rewards = [1.0, 0.5, 0.0]
    plain = loss(losses, rewards, normalize_weights=False)
    assert plain == pytest.approx(6.470422, abs=1e-6)
    assert loss(losses, rewards) == pytest.approx(1.164245, abs=1e-6)


def test_by_tokens_a_long_program_counts_more() -> None:
    """Worked out by hand: (12.182494 x 2.4 + 1 x 8) / 6 tokens."""
    losses = [[1.0, 1.4], [1.0, 2.0, 3.0, 2.0]]
    value = loss(losses, [1.0, 0.0], normalize_weights=False, loss_average="token")
    assert value == pytest.approx((12.182494 * 2.4 + 8.0) / 6, abs=1e-6)


def two_turns() -> tuple[list[RewardedChat], dict[Any, int]]:
    """T = 2 turns of m = 5 candidates, each of ten tokens: the second turn goes on from the third
    candidate of the first."""
    turns = [[("talk 1", 0, k) for k in range(5)], [("talk 2", 0, k) for k in range(5)]]
    first = [
        RewardedChat((key,), reward)
        for key, reward in zip(turns[0], (0, 0, 1, 0.5, 0), strict=True)
    ]
    second = [
        RewardedChat((turns[0][2], key), reward)
        for key, reward in zip(turns[1], (0.5, 0, 0, 0, 1), strict=True)
    ]
    return [*first, *second], {key: 10 for turn in turns for key in turn}


def test_a_chats_weight_trains_its_last_turn_or_all_of_them() -> None:
    """U5: ten samples; those of the second turn train two turns, both with their own weight."""
    chats, lengths = two_turns()
    exp = [math.exp(chat.reward / 0.4) for chat in chats]
    assert len(chats) == 10 and [len(chat.turns) for chat in chats] == [1] * 5 + [2] * 5
    last = turn_weights(chats, lengths, weighing(normalize_weights=False), 0)
    assert list(last.values()) == pytest.approx(exp)
    whole = turn_weights(chats, lengths, weighing(normalize_weights=False, trained_turns="all"), 0)
    # over ten turns of ten tokens -sum(weight x log p) / 100 is the mean of ten samples of w x CE,
    # where a sample of two turns is a mean over 20 tokens
    assert len(whole) == 10
    by_turn = [whole[key] for key in lengths]
    right = [exp[0], exp[1], exp[2] + sum(exp[5:]) / 2, exp[3], exp[4], *(w / 2 for w in exp[5:])]
    assert by_turn == pytest.approx(right)


@pytest.mark.parametrize(
    ("tau", "shares", "mean"),
    [
        (0.4, [0.730679, 0.209343, 0.059978], 0.835351),
        (1.0, [0.506480, 0.307196, 0.186324], 0.660078),
        (1e9, [1 / 3] * 3, 0.5),
    ],
)
def test_a_fit_to_uniform_data_is_the_softmax_of_rewards(
    tau: float, shares: list[float], mean: float
) -> None:
    """The closed form: the policy is proportional to exp(r / tau)."""
    rewards = [1.0, 0.5, 0.0]
    keys = [(f"talk {k}", 0, 0) for k in range(3)]
    chats = [RewardedChat((key,), reward) for key, reward in zip(keys, rewards, strict=True)]
    weights = turn_weights(chats, dict.fromkeys(keys, 1), weighing(tau=tau), 0)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([weights[key] for key in keys], dtype=torch.float64)
    for _ in range(300):
        value, _ = weighted_nll(logits.log_softmax(0), weight, 3.0)
        (slope,) = torch.autograd.grad(value, logits)
        logits = (logits - 2 * slope).detach().requires_grad_()
    fitted = logits.softmax(0).tolist()
    assert fitted == pytest.approx(shares, abs=1e-5)
    assert sum(p * r for p, r in zip(fitted, rewards, strict=True)) == pytest.approx(mean, abs=1e-5)
