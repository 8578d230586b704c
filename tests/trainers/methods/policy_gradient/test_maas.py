"""MaAS without a run: what systems count, what an update takes from episodes, and the offline
variant of the method sheet beside controls that must not learn.

Draws and their log-probs: tests/agents/programs/test_supernet.py; the network and its Adam:
tests/trainers/values/test_controller.py.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean
from typing import Any

import pytest
import torch

from marlora.agents.types import Reward, SettingError, Usage
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.maas import (
    MaASConfig,
    cost,
    draws_of,
    learn_controller,
    shares,
    system_weights,
)
from marlora.trainers.values.controller import Controller
from tests.trainers.supernets import drawn, learn, measured, queries, supernet

torch.set_num_threads(1)


def group(scores: list[float], costs: list[int], **fields: Any) -> list[Episode]:
    """Episodes of one query."""
    first = dataclasses.replace(drawn(supernet(), {}, queries()[0], "e"), group="g", **fields)
    return [
        dataclasses.replace(
            first,
            id=f"e{k}",
            rewards=(Reward("exact", score),),
            usage={"a": Usage(calls=calls - 1), "b": Usage(calls=1)},
        )
        for k, (score, calls) in enumerate(zip(scores, costs, strict=True))
    ]


def config(**settings: Any) -> MaASConfig:
    return MaASConfig(**{"cost_unit": "calls", **settings})


# what a system counts


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.0, 1.0, 0.0], [0.497500, -0.001250, 0.495000, -0.001250]),
        ([0.9, 0.6, 0.3, 0.2], [0.447500, 0.298750, 0.145000, 0.098750]),
    ],
)
def test_shares_of_reward_and_cost(scores: list[float], expected: list[float]) -> None:
    """Fact 1 of the sheet."""
    assert shares(scores, [2, 1, 4, 1], 0.01) == pytest.approx(expected, abs=1e-6)


def test_a_query_that_nobody_answers_counts_by_cost_alone() -> None:
    assert shares([0.0, 0.0], [1, 3], 0.4) == pytest.approx([-0.1, -0.3])
    assert shares([0.0, 1.0], [0, 0], 0.4) == pytest.approx([0.0, 1.0])


def test_the_variants_by_hand() -> None:
    """Two systems: right for 1 call, wrong for 3; lambda .4, so m = (.9, -.3)."""
    played = group([1.0, 0.0], [1, 3])
    chance = math.exp(math.fsum(d.logprob for d in played[0].decisions))

    def found(weights: str) -> list[float]:
        return list(system_weights(played, config(weights=weights, cost_weight=0.4)).values())

    assert found("shares") == pytest.approx([0.6, -0.6])
    assert 0 < chance < 1 and found("paper") == pytest.approx([0.9 * chance, -0.3 * chance])
    assert found("code") == pytest.approx([0.6, -1.2])
    assert found("utility") == pytest.approx([0.9, -0.9])


def test_systems_are_compared_with_those_of_their_query() -> None:
    easy = [dataclasses.replace(e, group="x", id=f"x{e.id}") for e in group([1.0, 1.0], [1, 1])]
    hard = group([1.0, 0.0], [1, 1])
    found = system_weights([*easy, *hard], config(weights="utility", cost_weight=0.0))
    assert found == pytest.approx({"xe0": 0.0, "xe1": 0.0, "e0": 0.5, "e1": -0.5})


@pytest.mark.parametrize("weights", ["shares", "paper"])
def test_shares_of_negative_rewards_are_refused(weights: str) -> None:
    """Of -1 and -2 the worse one would get the larger share of -3."""
    with pytest.raises(SettingError, match="weights: utility"):
        system_weights(group([-1.0, -2.0], [1, 1]), config(weights=weights, cost_weight=0.0))


def test_failed_episodes_are_in_no_sum() -> None:
    played = group([1.0, 0.0, 1.0], [1, 3, 100])
    broken = [*played[:2], dataclasses.replace(played[2], error="the server is gone")]
    unknown = [*played[:2], dataclasses.replace(played[2], rewards=(Reward("exact", math.nan),))]
    args = config(weights="shares", cost_weight=0.4)
    for episodes in (broken, unknown):
        assert system_weights(episodes, args) == pytest.approx({"e0": 0.6, "e1": -0.6})
    gone = [dataclasses.replace(e, error="the server is gone") for e in played]
    assert system_weights(gone, args) == {}


def test_a_cost_is_of_the_episodes_own_calls() -> None:
    usage = {"a": Usage(2, 30, 4, cost=0.5), "b": Usage(1, 10, 1, cost=0.25)}
    episode = dataclasses.replace(group([1.0], [1])[0], usage=usage)
    costs = {unit: cost(episode, unit) for unit in ("tokens", "calls", "cost")}
    assert costs == {"tokens": 45, "calls": 3, "cost": 0.75}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"weights": "mean"}, "weights: expected one of shares, paper, utility, code"),
        ({"cost_weight": -1.0}, "cost_weight: expected"),
        ({"cost_unit": "dollars"}, "cost_unit: expected one of tokens, calls, cost"),
        ({"num_generations": 1}, "weights: shares compares the systems of one query"),
        ({"max_staleness": 1}, "max_staleness: REINFORCE learns from systems that the present"),
        ({"episodes": "runs/other"}, "episodes: REINFORCE learns from systems that the present"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        config(**settings)
    config(num_generations=1, weights="code")


# one update


def test_draws_are_those_of_the_controller() -> None:
    system = supernet(threshold=0.7)
    controller = Controller("supernet", system.shape, 0.01, 3)
    controller.weights["2.score.weight"].data.normal_(std=0.5)
    values, task = dict(controller.values()), queries()[0]
    for n in range(8):
        episode = drawn(system, values, task, f"e{n}")
        draws = draws_of(system, episode)
        names = [(f"layer{draw.layer}", system.scored[draw.choice]) for draw in draws]
        assert names == [(d.name, d.choice) for d in episode.decisions]
        found = controller.log_softmax(draws)[range(len(draws)), [d.choice for d in draws]]
        assert found.tolist() == pytest.approx([d.logprob for d in episode.decisions], abs=1e-9)


def test_an_update_says_what_the_systems_were() -> None:
    system = supernet()
    controller = Controller("supernet", system.shape, 0.01, 0)
    tasks = queries()[:2]
    played = [drawn(system, {}, task, f"{task.id}/{k}") for task in tasks for k in range(4)]
    metrics = learn_controller(
        controller, system, played, config(cost_weight=0.1, reward_weights={"exact": 1})
    )
    costs = [cost(episode, "calls") for episode in played]
    rewards = [episode.reward("exact") for episode in played]
    assert metrics["episodes"] == 8 and metrics["cost"] == pytest.approx(fmean(costs))
    assert metrics["utility"] == pytest.approx(fmean(rewards) - 0.1 * fmean(costs))
    assert 1 <= metrics["layers"] <= metrics["operators"] and 0 <= metrics["early_exit"] <= 1
    with pytest.raises(ValueError, match="its kind is 'trial'"):
        trial = dataclasses.replace(played[0], kind="trial")
        learn_controller(controller, system, [trial], config())
    with pytest.raises(ValueError, match="it was drawn by another controller"):
        learn_controller(controller, system, played, config())


# the offline variant


def utility(found: dict[str, Any], lam: float) -> float:
    return fmean(kind["exact"] - lam * kind["calls"] for kind in found.values())


def test_easy_queries_are_settled_by_one_quick_answer() -> None:
    """At lambda .1, easy queries cost one call and hard ones more; U - lambda C rises."""
    system = supernet()
    before = measured(system, learn(system, 0, 0))
    after = measured(system, learn(system, 80, 0, cost_weight=0.1, learning_rate=0.01))
    told = f"before {before}, after {after}"
    assert utility(after, 0.1) > utility(before, 0.1) + 0.25, told
    easy, hard = after["easy"], after["hard"]
    assert easy["calls"] < 1.8 and hard["calls"] > easy["calls"] + 1, told
    assert easy["early_exit"] > hard["early_exit"], told
    assert easy["probabilities"]["layer1"]["quick"] > 0.9, told
    assert hard["probabilities"]["layer1"]["panel"] > 0.7, told


@pytest.mark.parametrize(
    "control", [{"learning_rate": 0.0}, {"reward_weights": {"chance": 1.0}, "cost_weight": 0.0}]
)
def test_a_fixed_controller_and_rewards_by_chance_learn_nothing(control: dict[str, Any]) -> None:
    system = supernet()
    before = measured(system, learn(system, 0, 0))
    controller = learn(system, 30, 0, **{"cost_weight": 0.1, "learning_rate": 0.01, **control})
    after = measured(system, controller)
    told = f"before {before}, after {after}"
    assert abs(utility(after, 0.1) - utility(before, 0.1)) < 0.12, told
    same = controller.sha256() == learn(system, 0, 0).sha256()
    assert same == ("learning_rate" in control)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "less"), [("utility", 0.7), ("shares", 0.3)])
def test_a_price_makes_systems_cheaper(weights: str, less: float) -> None:
    """lambda 0 against .1; in shares a price weighs less, as it is of a share."""
    system = supernet()

    def outcome(lam: float) -> dict[str, Any]:
        return measured(system, learn(system, 100, 0, cost_weight=lam, weights=weights))

    free, priced = outcome(0.0), outcome(0.1)
    told = f"{weights}: {free} free, {priced} priced"
    print(told)
    for kind in ("easy", "hard"):
        assert priced[kind]["calls"] < free[kind]["calls"], told
        assert min(free[kind]["exact"], priced[kind]["exact"]) > 0.75, told
    assert priced["easy"]["calls"] < free["easy"]["calls"] - less, told
    assert priced["easy"]["calls"] < priced["hard"]["calls"] - 1, told


@pytest.mark.slow
def test_the_papers_weights_learn_more_slowly() -> None:
    """m_k p(G_k) without a baseline: whatever is likely becomes likelier, hard queries suffer."""
    system = supernet()
    ours = measured(system, learn(system, 80, 0, cost_weight=0.1, learning_rate=0.01))
    paper = {"cost_weight": 0.1, "learning_rate": 0.01, "weights": "paper"}
    theirs = measured(system, learn(system, 80, 0, **paper))
    before = measured(system, learn(system, 0, 0))
    told = f"before {before}, paper {theirs}, ours {ours}"
    print(told)
    assert utility(before, 0.1) < utility(theirs, 0.1) < utility(ours, 0.1), told
