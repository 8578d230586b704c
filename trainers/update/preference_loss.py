"""The gradient of a preference between two whole runs by every part of a system (SysDPO,
arXiv:2502.17721).

A run's probability is the product of its parts' (eq. F1), so its log-ratio to a reference is a sum
with one summand per part. The parts are coupled through these scalars only: dLoss/dlog p of a turn
is one number, which all of its tokens share. So the log-ratios are computed first, by forward
passes alone; `margin_gradient` turns them into one weight per part; and each turn's backward pass
runs with its own weight, one row at a time. The gradient is that of the joint loss.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.nn.functional import logsigmoid

from ...agents.settings import Settings, setting
from ...agents.types import SettingError
from ..credit.pairs import Pair

K = TypeVar("K", bound=Hashable)

MODES, LOSSES = ("joint", "independent", "sampling"), ("sigmoid", "hinge", "ipo", "robust")


@dataclass
class MarginConfig(Settings):
    """How preferences become a loss. Names are TRL's where it has one."""

    mode: str = setting(
        "joint: one margin over all agents (SysDPO-Direct); independent: one per policy, plain DPO;"
        " sampling: one over all agents, the output's probability summed over several drafts"
        " (SysDPO-Sampling)",
        "joint",
        choices=MODES,
    )
    beta: float = setting("scale of the margin: the cost of leaving the reference", 0.1, above=0)
    loss_type: str = setting("sigmoid, hinge, ipo or robust", "sigmoid", choices=LOSSES)
    label_smoothing: float = setting(
        "assumed share of wrong preferences: sigmoid becomes cDPO, robust needs it",
        0.0,
        at_least=0,
        below=0.5,
    )
    length_normalised: bool = setting(
        "divide an agent's log-probability by its tokens in the episode; not SysDPO, but a"
        " long-winded agent then weighs no more",
        False,
    )

    def check(self) -> None:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise SettingError(
                f"label_smoothing: only sigmoid and robust have it; loss_type is {self.loss_type}"
            )


@dataclass(frozen=True)
class RunLogRatio:
    """One part of one run: what `agent` said in a turn, or what another component made.

    `now` and `reference` are its log-probabilities (of a component without one: the surrogate of
    their difference, and 0).
    """

    episode: str
    agent: str
    policy: str
    now: float
    reference: float
    tokens: int = 1


@dataclass(frozen=True)
class MarginGradient(Generic[K]):
    """Loss of a set of pairs and its gradient by every part.

    weights: -dLoss/dlog p of every part.
    margins: of every pair, without beta (of independent policies: their sum).
    by_agent: the mean over pairs of each agent's log-ratio, chosen - rejected; their sum is the
        margins' mean, but for factors, length normalisation and drafts.
    """

    loss: float
    weights: dict[K, float]
    margins: list[float]
    by_agent: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen run has gained on the rejected one."""
        return sum(margin > 0 for margin in self.margins) / len(self.margins)


def margin_gradient(
    pairs: Sequence[Pair], log_ratios: Mapping[K, RunLogRatio], config: MarginConfig
) -> MarginGradient[K]:
    """The mean loss of the pairs, and its gradient by every part. An episode without parts (all
    its parts frozen) counts 0.

    Joint: -log sigmoid(beta [sum_v D_v(chosen) - sum_v D_v(rejected)]) with D_v = log p - log
    p_reference (eq. F3, F4). Independent: the same for each policy's own parts, summed. A side with
    several alternatives is log sum_a p(a), for policy and reference alike. A pair's factors
    multiply its two sides' log-ratios: (s_w, 1 - s_l) is Score-DPO (arXiv:2502.04306).
    """
    keys, parts = list(log_ratios), list(log_ratios.values())
    length = torch.tensor(
        _lengths(parts) if config.length_normalised else [1.0] * len(keys), dtype=torch.float64
    )
    now = torch.tensor([part.now for part in parts], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([part.reference for part in parts], dtype=torch.float64)
    weight = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64)
    factors = torch.tensor([pair.factors for pair in pairs], dtype=torch.float64).T  # [2, P]
    policies = sorted({part.policy for part in parts}) if config.mode == "independent" else []
    unit = {
        policy: number for number, policy in enumerate(policies)
    }  # what has a margin of its own; joint: all are unit 0
    place = {
        name: number
        for number, name in enumerate(dict.fromkeys(e.id for pair in pairs for e in pair.episodes))
    }
    at = torch.tensor(
        [unit.get(part.policy, 0) * len(place) + place[part.episode] for part in parts],
        dtype=torch.long,
    )
    sides = [
        [[place[e.id] for e in side] for side in end]
        for end in zip(*((p.chosen, p.rejected) for p in pairs), strict=True)
    ]

    def margin_of(values: torch.Tensor) -> torch.Tensor:
        runs = torch.zeros(max(1, len(unit)) * len(place), dtype=torch.float64).index_add(
            0, at, values / length
        )
        chosen, rejected = (_marginals(runs.view(-1, len(place)), side) for side in sides)
        return factors[0] * chosen - factors[1] * rejected

    margin = margin_of(now) - margin_of(reference)  # [units, P]
    loss = (weight * preference_loss(margin, config)).sum() / len(pairs)
    (grad,) = torch.autograd.grad(loss, now)
    return MarginGradient(
        loss.item(),
        dict(zip(keys, (-grad).tolist(), strict=True)),
        margin.detach().sum(0).tolist(),
        _by_agent(pairs, log_ratios),
    )


def preference_loss(margin: torch.Tensor, config: MarginConfig) -> torch.Tensor:
    """Loss of every pair from its margin without beta; any shape.

    sigmoid: DPO (arXiv:2305.18290), with label smoothing cDPO; robust: arXiv:2403.00409; hinge:
    SLiC (2305.10425); ipo: (2310.12036), whose margin TRL takes per token (`length_normalised`).
    """
    scaled, flipped = config.beta * margin, config.label_smoothing
    if config.loss_type == "hinge":
        return torch.relu(1 - scaled)
    if config.loss_type == "ipo":
        return (margin - 1 / (2 * config.beta)) ** 2
    right, wrong = -logsigmoid(scaled), -logsigmoid(-scaled)
    if config.loss_type == "robust":
        return ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)
    return (1 - flipped) * right + flipped * wrong


def _marginals(runs: torch.Tensor, sides: list[list[int]]) -> torch.Tensor:
    """[U, P] log sum exp over the alternatives of every side, from runs [U, E]."""
    if all(len(side) == 1 for side in sides):
        return runs[:, torch.tensor(sides)[:, 0]]
    return torch.stack([torch.logsumexp(runs[:, side], 1) for side in sides], 1)


def _lengths(log_ratios: Sequence[RunLogRatio]) -> list[float]:
    """Per part, the tokens of its agent in its episode."""
    total: dict[tuple[str, str], int] = {}
    for part in log_ratios:
        total[part.episode, part.agent] = total.get((part.episode, part.agent), 0) + part.tokens
    return [float(max(1, total[part.episode, part.agent])) for part in log_ratios]


def _by_agent(pairs: Sequence[Pair], log_ratios: Mapping[K, RunLogRatio]) -> dict[str, float]:
    ratio: dict[tuple[str, str], float] = {}
    for part in log_ratios.values():
        ratio[part.agent, part.episode] = (
            ratio.get((part.agent, part.episode), 0.0) + part.now - part.reference
        )
    means = {}
    for agent in sorted({part.agent for part in log_ratios.values()}):
        sides = [
            [sum(ratio.get((agent, e.id), 0.0) for e in s) / len(s) for s in (p.chosen, p.rejected)]
            for p in pairs
        ]
        means[agent] = sum(chosen - rejected for chosen, rejected in sides) / len(pairs)
    return means
