"""The loss of a whole step, from rewards to gradients, against TRL's over the same completions:
turns of advantage 0 and constant groups count in what it is divided by, and have their KL
and entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from marlora.agents.types import Reward, Task, Turn
from marlora.rollouts.types import Episode, TurnKey
from marlora.trainers.batching.samples import Denominators, TrainingSequence
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import RULE_NAMES, CreditConfig
from marlora.trainers.update.losses.inputs import LossInputs
from marlora.trainers.update.losses.policy_gradient import LossConfig, policy_loss
from marlora.trainers.update.policy_batch import policy_batch

LENGTHS = (3, 1, 5, 2)
GROUPS = {
    "one in the middle": [(0.0, 0.5, 1.0)],
    "one in the middle, up to rounding": [(0.1, 0.2, 0.3)],
    "a constant group": [(1.0, 0.0, 0.0, 1.0), (1.0, 1.0, 1.0)],
    "a constant group, up to rounding": [(1.0, 0.0), (0.1 + 0.2, 0.3, 0.3)],
    "constant groups alone": [(0.0, 0.0), (0.7, 0.7, 0.7)],
}
Step = tuple[list[Episode], dict[TurnKey, tuple[torch.Tensor, torch.Tensor]]]


def played(groups: list[tuple[float, ...]]) -> Step:
    """Episodes of a turn each, with log-probs now and of the reference by turn."""
    generator = torch.Generator().manual_seed(1)
    episodes, now = [], {}
    rewards = [(g, i, r) for g, group in enumerate(groups) for i, r in enumerate(group)]
    for number, (g, i, reward) in enumerate(rewards):
        length = LENGTHS[number % len(LENGTHS)]
        said = -1 - torch.rand(length, generator=generator, dtype=torch.float64)
        turn = Turn(0, "a", prompt_ids=(1,), token_ids=(5,) * length, logprobs=tuple(said.tolist()))
        name = f"g{g}e{i}"
        episodes.append(
            Episode(name, f"g{g}", Task("t", "?"), turns=(turn,), rewards=(Reward("r", reward),))
        )
        moved = (0.2 * torch.randn(2, length, generator=generator, dtype=torch.float64)) + said
        now[name, 0, 0] = (moved[0].requires_grad_(), moved[1])
    return episodes, now


def ours(step: Step, rule: CreditConfig, config: LossConfig) -> torch.Tensor:
    episodes, now = step
    without: set[TurnKey] = set()
    advantages = credit(episodes, rule, {}, without)
    sequences, _, how = policy_batch(episodes, advantages, without, {"a": "a"}, config)
    assert how.reference == bool(config.beta) and how.entropy_grad == bool(config.entropy_coef)
    if not sequences:
        return sum((0 * logp.sum() for logp, _ in now.values()), torch.zeros(()))
    assert how.totals is not None
    inputs = flat(sequences, now, how.totals["a"])
    return policy_loss(inputs, config)[0]


def flat(sequences: list[TrainingSequence], now: Any, total: Denominators) -> LossInputs:
    keys = [s.keys[0] for s in sequences]
    logp = torch.cat([now[key][0] for key in keys])
    trained = [n for s in sequences for n in range(len(s.ids)) if s.mask[n]]
    place = [s for s in sequences for n in range(len(s.ids)) if s.mask[n]]
    return LossInputs(
        logp=logp,
        entropy=-logp,  # any function of it serves
        behaviour=torch.tensor([s.logprobs[n] for s, n in zip(place, trained, strict=True)]).to(
            torch.float64
        ),
        advantage=torch.tensor(
            [s.advantages[n] for s, n in zip(place, trained, strict=True)], dtype=torch.float64
        ),
        sequence=torch.tensor([k for k, s in enumerate(sequences) for _ in s.keys]),
        total=total,
        reference=torch.cat([now[key][1] for key in keys]),
    )


def by_hand(step: Step, rule: CreditConfig, config: LossConfig) -> torch.Tensor:
    """Sum over all completions: clipped surrogate, KL times ratio, entropy; divided by all."""
    episodes, now = step
    groups: dict[str, list[float]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(round(e.rewards[0].value, 9))
    terms, entropy, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for e in episodes:
        own = torch.tensor(groups[e.group], dtype=torch.float64)
        advantage = (round(e.rewards[0].value, 9) - own.mean()) / (own.std() + 1e-4)
        logp, reference = now[e.id, 0, 0]
        ratio = (logp - torch.tensor(e.turns[0].logprobs, dtype=torch.float64)).exp()
        loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        away = logp - reference
        loss = loss + config.beta * ratio * ((-away).exp() + away - 1)
        terms.append(loss)
        entropy = entropy - logp.sum()
        tokens += len(logp)
    value = torch.cat(terms).sum() / tokens
    if config.loss_type == "grpo":
        value = torch.stack([t.mean() for t in terms]).mean()
    elif config.loss_type == "dr_grpo":
        value = torch.cat(terms).sum() / (len(terms) * config.max_completion_length)
    elif config.loss_type == "luspo":
        value = torch.cat(terms).sum() / len(terms)
    return value - config.entropy_coef * entropy / tokens


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("more", [{}, {"beta": 0.3}, {"entropy_coef": 0.2}], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_step_s_loss_by_hand(
    groups: list[tuple[float, ...]], more: dict[str, float], loss_type: str
) -> None:
    config = LossConfig(loss_type=loss_type, max_completion_length=5, **more)  # type: ignore[arg-type]
    step = played(groups)
    rule = CreditConfig()
    leaves = [logp for logp, _ in step[1].values()]
    found = torch.autograd.grad(ours(step, rule, config), leaves, allow_unused=True)
    expected = torch.autograd.grad(by_hand(step, rule, config), leaves)
    for mine, right in zip(found, expected, strict=True):
        mine = torch.zeros_like(right) if mine is None else mine
        assert torch.allclose(mine, right, atol=1e-7), (mine, right)
    alive = max(float(right.abs().max()) for right in expected) > 1e-9
    assert alive == bool(more or any(max(g) > min(g) + 1e-9 for g in groups))


def test_an_advantage_that_goes_to_zero_moves_nothing() -> None:
    """Between an advantage of 1e-9 and one of 0 the gradients of the others do not jump."""
    found = []
    for middle in (0.5, 0.5 + 1e-9):
        step = played([(0.0, middle, 1.0)])
        loss = ours(step, CreditConfig(credit="dr_grpo"), LossConfig())
        found.append(torch.autograd.grad(loss, step[1]["g0e2", 0, 0][0])[0])
    assert found[0].abs().max() > 1e-3 and torch.allclose(*found, rtol=1e-6)


@pytest.mark.parametrize("rule", [r for r in RULE_NAMES if r not in ("counterfactual", "success")])
def test_every_rule_names_the_turns_it_compared(rule: str) -> None:
    """Known rewards, all equal: each turn has an advantage or is named as one of a constant group;
    turns of failed and unscored episodes are neither."""
    good = [
        Episode(
            f"e{n}",
            "g",
            Task("t", "?"),
            turns=tuple(
                Turn(0, "a", token_ids=(1,), logprobs=(-1.0,), sibling=s, taken=not s)
                for s in range(2 if rule == "at_grpo" else 1)
            ),
            rewards=tuple(
                Reward("r", 0.25, "", "a", 0, s) if rule == "at_grpo" else Reward("r", 0.25)
                for s in range(2 if rule == "at_grpo" else 1)
            ),
        )
        for n in range(2)
    ]
    turn = Turn(0, "a", token_ids=(1,), logprobs=(-1.0,))
    bad = [
        Episode("x", "g", Task("t", "?"), turns=(turn,), error="gone"),
        Episode("y", "g", Task("t", "?"), turns=(turn,), rewards=(Reward("r", float("nan")),)),
    ]
    without: set[TurnKey] = set()
    advantages = credit([*good, *bad], CreditConfig(credit=rule), {}, without)
    compared = {(e.id, t.index, t.sibling) for e in good for t in e.turns}
    assert set(advantages) | without == compared and not set(advantages) & without
    assert bool(without) == (rule in ("grpo", "rloo", "dr_grpo", "dr_mas", "at_grpo"))


def rows(step: Step) -> Iterator[tuple[Episode, torch.Tensor, torch.Tensor]]:
    for e in step[0]:
        yield (e, *step[1][e.id, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_step_s_loss_is_trl_s(
    groups: list[tuple[float, ...]], beta: float, loss_type: str
) -> None:
    """All completions of the step in one padded batch of TRL's GRPOTrainer."""
    from tests.trainers.update.test_losses_trl import trl_loss

    config = LossConfig(
        loss_type=loss_type, beta=beta, max_completion_length=5, vllm_importance_sampling_mode="off"
    )
    step = played(groups)
    width, count = max(len(logp) for logp, _ in step[1].values()), len(step[0])

    def padded(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(v, (0, width - len(v))) for v in values])

    logps = [logp for _, logp, _ in rows(step)]
    said = [torch.tensor(e.turns[0].logprobs, dtype=torch.float64) for e, _, _ in rows(step)]
    rewards = torch.cat(
        [
            (own - own.mean()) / (own.std() + 1e-4)
            for own in (torch.tensor(g, dtype=torch.float32).double() for g in groups)
        ]
    )
    assert len(rewards) == count
    data = {
        "old": padded(said),
        "sampler": padded(said),
        "ref": padded([reference for _, _, reference in rows(step)]),
        "mask": padded([torch.ones_like(logp) for logp in logps]),
        "advantages": rewards,
    }
    expected = torch.autograd.grad(trl_loss(padded(logps), data, config), logps)
    found = torch.autograd.grad(ours(step, CreditConfig(), config), logps, allow_unused=True)
    for mine, right in zip(found, expected, strict=True):
        mine = torch.zeros_like(right) if mine is None else mine
        assert torch.allclose(mine, right, atol=1e-6), (mine, right)
