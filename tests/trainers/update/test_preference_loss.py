"""SysDPO's numbers: margins, losses and weights worked out by hand, and a system of two tables
trained through pairs and push."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.pairs import Pair, PairConfig, pairs_of
from marlora.trainers.methods.preference.components import diffusion_log_ratio
from marlora.trainers.update.preference_loss import (
    MarginConfig,
    MarginGradient,
    RunLogRatio,
    margin_gradient,
)


def run_of(name: str) -> Episode:
    return Episode(name, "g", Task("t", "2+2?"))


def pair(chosen: str = "w", rejected: str = "l", **fields: Any) -> Pair:
    return Pair(
        tuple(map(run_of, chosen.split())), tuple(map(run_of, rejected.split())), 1.0, **fields
    )


def votes(
    agents: dict[str, dict[str, tuple[float, float]]], tokens: int = 1
) -> dict[tuple[str, str], RunLogRatio]:
    """agent -> run -> (log p, log p of the reference)"""
    return {
        (agent, name): RunLogRatio(name, agent, agent, *logps, tokens)
        for agent, runs in agents.items()
        for name, logps in runs.items()
    }


TWO = {
    "one": {"w": (-12.0, -13.0), "l": (-15.0, -14.5)},
    "two": {"w": (-20.0, -20.5), "l": (-18.0, -18.2)},
}


def pushed(
    agents: dict[str, Any] = TWO, pairs: list[Pair] | None = None, **settings: Any
) -> MarginGradient[tuple[str, str]]:
    return margin_gradient(pairs or [pair()], votes(agents), MarginConfig(**settings))


@pytest.mark.parametrize("agents", [1, 2, 5])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_at_the_reference_the_loss_is_ln_2(agents: int, beta: float) -> None:
    same = {f"a{k}": {"w": (-3.0 - k, -3.0 - k), "l": (-5.0, -5.0)} for k in range(agents)}
    found = pushed(same, beta=beta)
    assert found.loss == pytest.approx(0.693147, abs=1e-6) and found.margins == [0.0]
    assert set(found.weights.values()) == {beta / 2, -beta / 2}


def test_all_turns_of_two_agents_share_one_weight() -> None:
    """Margins 1.5 and .3: m = .1 x 1.8."""
    found = pushed()
    assert found.margins == pytest.approx([1.8]) and found.by_agent == pytest.approx(
        {"one": 1.5, "two": 0.3}
    )
    assert found.loss == pytest.approx(0.607192, abs=1e-6) and found.accuracy == 1.0
    assert {key: round(weight, 6) for key, weight in found.weights.items()} == {
        ("one", "w"): 0.045512,
        ("one", "l"): -0.045512,
        ("two", "w"): 0.045512,
        ("two", "l"): -0.045512,
    }


def test_independent_agents_have_a_loss_each() -> None:
    found = pushed(mode="independent")
    assert (
        found.loss
        == pytest.approx(0.620957 + 0.678260, abs=1e-6)
        == pytest.approx(1.299217, abs=1e-6)
    )
    assert (
        found.weights["one", "w"]
        == pytest.approx(0.1 / (1 + math.exp(0.15)))
        != pytest.approx(found.weights["two", "w"])
    )
    assert pushed(
        {a: {"w": (-1.0, -1.0), "l": (-2.0, -2.0)} for a in ("one", "two")}, mode="independent"
    ).loss == pytest.approx(1.386294, abs=1e-6)


@pytest.mark.parametrize(("beta", "loss"), [(0.5, 0.341154), (1.0, 0.152978)])
def test_beta_scales_the_margin(beta: float, loss: float) -> None:
    assert pushed(beta=beta).loss == pytest.approx(loss, abs=1e-6)


DRAFTS = {
    "draft": {"w1": (-1.2, -1.3), "w2": (-1.5, -1.4), "l1": (-1.0, -1.1), "l2": (-2.2, -2.0)},
    "final": {"w1": (-2.0, -2.1), "w2": (-0.7, -1.0), "l1": (-2.5, -2.2), "l2": (-1.1, -1.2)},
}


@pytest.mark.parametrize(
    ("beta", "margin", "loss"), [(0.1, 0.034626, 0.675984), (0.5, 0.173129, 0.610325)]
)
def test_drafts_are_summed_and_pushed_by_their_responsibilities(
    beta: float, margin: float, loss: float
) -> None:
    """log sum exp: policy -1.886738 and -2.701861, reference -2.086738 and -2.555603."""
    found = pushed(DRAFTS, [pair("w1 w2", "l1 l2")], beta=beta, mode="sampling")
    assert beta * found.margins[0] == pytest.approx(
        margin, abs=1e-6
    ) and found.loss == pytest.approx(loss, abs=1e-6)
    strength = beta / (1 + math.exp(margin))
    for agent in DRAFTS:
        assert found.weights[agent, "w1"] / strength == pytest.approx(0.268941, abs=1e-5)
        assert found.weights[agent, "w2"] / strength == pytest.approx(0.731059, abs=1e-5)
        assert found.weights[agent, "l1"] + found.weights[agent, "l2"] == pytest.approx(
            -strength, abs=1e-6
        )


def test_one_draft_is_the_direct_margin() -> None:
    assert pushed(mode="sampling") == pushed(mode="joint")


def test_a_diffusion_model_votes_by_its_denoising_losses() -> None:
    def surrogate(*losses: tuple[float, float]) -> float:
        mine, reference = torch.tensor(losses, dtype=torch.float64).unbind(1)
        return float(diffusion_log_ratio(mine, reference, 1000))

    painter = {
        "w": (surrogate((0.0101, 0.0103), (0.0098, 0.0099), (0.0110, 0.0112)), 0.0),
        "l": (surrogate((0.0120, 0.0119), (0.0115, 0.0115), (0.0109, 0.0111)), 0.0),
    }
    found = pushed({"writer": {"w": (-1.0, -1.4), "l": (-2.0, -1.8)}, "painter": painter})
    assert [painter["w"][0] + 0.4, painter["l"][0] - 0.2] == pytest.approx([0.9, -0.1])
    assert found.loss == pytest.approx(0.644397, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"loss_type": "hinge"}, 1 - 0.18),
        ({"loss_type": "ipo", "beta": 0.5}, (1.8 - 1.0) ** 2),
        (
            {"label_smoothing": 0.1},
            0.9 * 0.607192 + 0.1 * 0.787192,
        ),  # cDPO: -log sigmoid(-.18) = .18 - log sigmoid(.18)
        ({"loss_type": "robust", "label_smoothing": 0.1}, (0.9 * 0.607192 - 0.1 * 0.787192) / 0.8),
    ],
)
def test_other_losses_of_the_same_margin(settings: dict[str, Any], loss: float) -> None:
    assert pushed(**settings).loss == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "ipo"},
        {"mode": "independent"},
    ],
)
def test_weights_are_the_slope_of_the_loss(settings: dict[str, Any]) -> None:
    pairs = [pair(), pair("w", "x", weight=0.5), pair("x", "l")]
    agents = {agent: {**runs, "x": (-9.0, -9.5)} for agent, runs in TWO.items()}
    config, here = MarginConfig(**settings), votes(agents)
    for key, weight in margin_gradient(pairs, here, config).weights.items():
        sides = []
        for step in (1e-4, -1e-4):
            moved = {**here, key: dataclasses.replace(here[key], now=here[key].now + step)}
            sides.append(margin_gradient(pairs, moved, config).loss)
        assert -weight == pytest.approx((sides[0] - sides[1]) / 2e-4, abs=1e-6)


def test_length_normalisation_counts_an_agents_tokens_of_the_whole_episode() -> None:
    """Two turns of 3 and 1 tokens: their log-ratios .8 and .4 count .3 together; the other run is
    at the reference."""
    long = {
        0: RunLogRatio("w", "a", "a", -1.0, -1.8, 3),
        1: RunLogRatio("w", "a", "a", -1.0, -1.4, 1),
        2: RunLogRatio("l", "a", "a", -2.0, -2.0, 7),
    }
    found = margin_gradient([pair()], long, MarginConfig(length_normalised=True, beta=1.0))
    assert found.margins == pytest.approx([0.3])
    assert (
        found.weights[0]
        == pytest.approx(found.weights[1])
        == pytest.approx(1 / (1 + math.exp(0.3)) / 4)
    )
    assert margin_gradient([pair()], long, MarginConfig(beta=1.0)).margins == pytest.approx([1.2])


def test_pairs_count_by_their_weight_and_frozen_parts_nothing() -> None:
    assert pushed(pairs=[pair(weight=0.5)]).loss == pytest.approx(0.5 * 0.607192, abs=1e-6)
    frozen = pushed({"one": TWO["one"]})
    assert frozen.margins == pytest.approx([1.5]) and set(frozen.weights) == {
        ("one", "w"),
        ("one", "l"),
    }
    assert margin_gradient([pair()], {}, MarginConfig()).loss == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "together"},
            "mode: expected one of joint, independent, sampling, got 'together'",
        ),
        ({"loss_type": "dpo"}, "loss_type: expected one of sigmoid"),
        ({"beta": 0.0}, "beta: expected a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected a number from 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "only sigmoid and robust have it"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MarginConfig(**settings)


REWARD = [[0.0, 0.2, 0.1], [0.3, 1.0, 0.2], [0.1, 0.4, 0.5]]  # of first's symbol and last's


def table(*trained: str, told: tuple[int, ...] = (200,)) -> list[tuple[float, float]]:
    """Mean loss and expected reward of two tables after so many steps of gradient descent (rate 1,
    beta .5) on every pair of cells."""
    cells = [
        Episode(
            f"{y}{z}",
            f"g{y}{z}",
            Task("t", ""),
            rewards=(Reward("r", REWARD[y][z]),),
            turns=(Turn(0, "first", token_ids=(y,)), Turn(1, "last", token_ids=(z,))),
        )
        for y in range(3)
        for z in range(3)
    ]
    pairs = pairs_of(cells, PairConfig(), seed=0)
    assert len(pairs) == 34
    first, last = (
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
        torch.zeros(3, 3, dtype=torch.float64, requires_grad=True),
    )
    uniform = math.log(1 / 3)

    def said() -> dict[tuple[str, str], torch.Tensor]:
        both = {"first": first.log_softmax(-1)[:, None].expand(3, 3), "last": last.log_softmax(-1)}
        return {
            (name, e.id): both[name][int(e.id[0]), int(e.id[1])] for name in trained for e in cells
        }

    told_of = []
    for step in range(max(told) + 1):
        here = said()
        found = margin_gradient(
            pairs,
            {k: RunLogRatio(k[1], k[0], k[0], p.item(), uniform) for k, p in here.items()},
            MarginConfig(beta=0.5),
        )
        if step in told:
            joint = (first.softmax(-1)[:, None] * last.softmax(-1)).detach()
            told_of.append((found.loss, float((joint * torch.tensor(REWARD)).sum())))
        (-torch.stack([found.weights[k] * p for k, p in here.items()]).sum()).backward()
        for parameter in (first, last):
            if parameter.grad is not None:
                parameter.data -= parameter.grad
                parameter.grad = None
    return told_of


def test_a_system_of_two_tables() -> None:
    """Loss and expected reward after 0, 1, 10, 50 and 200 steps; both tables together beat either
    alone."""
    together = table("first", "last", told=(0, 1, 10, 50, 200))
    expected = [
        (0.693147, 0.311111),
        (0.669972, 0.328518),
        (0.524205, 0.448749),
        (0.306680, 0.662380),
        (0.149991, 0.847042),
    ]
    assert together == [pytest.approx(pair, abs=1e-6) for pair in expected]
    (first,), (last,) = table("first"), table("last")
    assert first == pytest.approx((0.471343, 0.447379), abs=1e-6)
    assert last == pytest.approx((0.279107, 0.518327), abs=1e-6)
    assert together[-1][1] > max(first[1], last[1]) + 0.3
