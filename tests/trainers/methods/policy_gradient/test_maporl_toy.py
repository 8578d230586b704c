"""A debate small enough to be solved: two members, right with chance .6 each, and flags that tell
right from wrong with accuracy .9.

Where the answers differ, a member keeps its own or takes the other's, by four logits: one for each
pair of flags, (own, other's). Both members share them. Accuracy of the second round follows from
them exactly; believing the flags makes at most .7918 of .6, or .84 with flags that are always
right. The gradients below go through the losses that train language models.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from marlora.trainers.batching.samples import Denominators
from marlora.trainers.credit.reward_shaping import influence
from marlora.trainers.update.gae import gae, token_rewards, whiten
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss
from marlora.trainers.update.losses.value import value_loss

RIGHT, FLAG = 0.6, 0.9
KEEP, SWITCH = 0, 1


def chance(flag: int, right: bool, accuracy: float) -> float:
    return accuracy if flag == right else 1 - accuracy


def actions(logits: torch.Tensor) -> torch.Tensor:
    """[2 own flag, 2 other's flag, 2 actions] log-probabilities of keep and switch."""
    return torch.log_softmax(torch.stack([torch.zeros_like(logits), logits], -1), -1)


def situations(accuracy: float = FLAG) -> list[tuple[float, int, int, int]]:
    """(chance, own flag, other's flag, the action that ends right) of all situations in which one
    member is right and the other is wrong."""
    return [
        (
            RIGHT * (1 - RIGHT) * chance(own, mine, accuracy) * chance(other, not mine, accuracy),
            own,
            other,
            KEEP if mine else SWITCH,
        )
        for mine, own, other in itertools.product((True, False), (0, 1), (0, 1))
    ]


def accuracy_of(logits: torch.Tensor, accuracy: float = FLAG) -> float:
    return RIGHT**2 + sum(
        p * float(actions(logits)[own, other, right].exp())
        for p, own, other, right in situations(accuracy)
    )


def exact(steps: list[int], accuracy: float = FLAG) -> tuple[list[float], torch.Tensor]:
    """Accuracies after so many steps of size 20 along the exact policy gradient, which
    `policy_loss` gives where every situation and action is a term of its own and its advantage is
    its chance times its reward."""
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    terms = [
        (p, own, other, act, float(act == right))
        for p, own, other, right in situations(accuracy)
        for act in (KEEP, SWITCH)
    ]
    index = torch.tensor([term[1:4] for term in terms]).T
    weight, reward = (
        torch.tensor([term[k] for term in terms], dtype=torch.float64) for k in (0, 4)
    )
    found = [accuracy_of(logits, accuracy)]
    for step in range(1, max(steps) + 1):
        logp = actions(logits)[tuple(index)]
        behaviour = logp.detach()
        inputs = LossInputs(
            logp=logp,
            entropy=torch.zeros_like(behaviour),
            behaviour=behaviour,
            advantage=weight * behaviour.exp() * reward,
            sequence=torch.arange(len(terms)),
            total=Denominators(1, 1),
        )
        loss, _ = policy_loss(inputs, LossConfig())
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 20 * gradient
        if step in steps:
            found.append(accuracy_of(logits, accuracy))
    return found, logits.detach()


def test_exact_gradients_reach_the_accuracies():
    found, logits = exact([1, 10, 100, 500])
    assert found == pytest.approx([0.6, 0.685679, 0.781553, 0.790995, 0.791800], abs=1e-6)
    switch = actions(logits)[:, :, SWITCH].exp()
    assert switch[0, 1] > 0.99 and switch[1, 0] < 0.01
    assert switch[0, 0] == switch[1, 1] == 0.5  # equal flags tell nothing


def test_with_flags_that_are_always_right_the_limit_is_that_of_one_being_right():
    found, _ = exact([500], accuracy=1.0)
    assert found[-1] == pytest.approx(1 - (1 - RIGHT) ** 2, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_sampled_trainer_approaches_them(seed: int):
    """The same by PPO: 256 debates a step, influence-aware rewards, a critic with a number per pair
    of flags, four epochs."""
    rng, table = random.Random(seed), torch.zeros(2, 2, requires_grad=True)
    critic = torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [table], "lr": 0.1}, {"params": [critic], "lr": 0.1}])
    errors = []
    for _ in range(40):
        states, acts, scores = played(rng, table.detach())
        index = tuple(torch.tensor(states).T)
        values = critic.detach()[index]
        judged = [
            gae(token_rewards(score, torch.zeros(1), 0.0), v[None], 1.0, 0.95)
            for score, v in zip(scores, values, strict=True)
        ]
        advantage, returns = (
            whiten(torch.cat([a for a, _ in judged])).float(),
            torch.cat([r for _, r in judged]).float(),
        )
        errors.append(float(((values - returns) ** 2).mean()))
        act, total = torch.tensor(acts), Denominators(len(acts), len(acts))
        behaviour = actions(table.detach())[(*index, act)]
        for _ in range(4):
            inputs = LossInputs(
                logp=actions(table)[(*index, act)],
                entropy=torch.zeros_like(advantage),
                behaviour=behaviour,
                advantage=advantage,
                sequence=torch.arange(len(acts)),
                total=total,
            )
            loss, _ = policy_loss(inputs, LossConfig())
            loss = loss + value_loss(critic[index], values, returns, 0.2, total)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert accuracy_of(table.detach().double()) > 0.78
    assert sum(errors[-5:]) < 0.9 * sum(
        errors[:5]
    )  # the critic learns what pairs of flags are worth


def played(
    rng: random.Random, table: torch.Tensor, debates: int = 256
) -> tuple[list[tuple[int, int]], list[int], list[float]]:
    """Pairs of flags, actions and rewards of the members whose answers differed, in sampled
    debates."""
    switch = actions(table)[:, :, SWITCH].exp().tolist()
    states, acts, rewards = [], [], []
    for _ in range(debates):
        right = [rng.random() < RIGHT for _ in range(2)]
        flags = [int(r) if rng.random() < FLAG else 1 - int(r) for r in right]
        if right[0] == right[1]:
            continue
        mine = [(flags[n], flags[1 - n]) for n in range(2)]
        act = [int(rng.random() < switch[own][other]) for own, other in mine]
        last = [float(right[n] if act[n] == KEEP else right[1 - n]) for n in range(2)]
        worth = influence([dict(enumerate(map(float, right))), dict(enumerate(last))])[1]  # type: ignore[list-item]
        states, acts, rewards = states + mine, acts + act, rewards + [worth[n] for n in range(2)]  # type: ignore[index]
    return states, acts, rewards
