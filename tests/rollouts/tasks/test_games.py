"""Task sets and rewards of the games."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from marlora.agents.games.base import Game
from marlora.agents.games.exchange import Exchange
from marlora.agents.games.trade import Trade
from marlora.agents.games.ultimatum import Ultimatum
from marlora.agents.testing import fake_team
from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.rewards.builtin import resolve_rewards
from marlora.rollouts.rewards.games import payoff
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.types import Episode

SETS = {"ultimatum": Ultimatum, "trade": Trade, "exchange": Exchange}


def tasks(name: str, split: str, seed: int = 0, **args: int) -> list[Task]:
    return load_tasks(f"marlora.rollouts.tasks.games:{name}", split, seed=seed, **args)


@pytest.mark.parametrize("name", SETS)
def test_splits_are_disjoint_and_the_seed_orders(name: str) -> None:
    train, again, other = tasks(name, "train"), tasks(name, "train"), tasks(name, "train", seed=1)
    assert train == again and [t.id for t in train] != [t.id for t in other]
    held_out = {t.id for seed in range(3) for t in tasks(name, "eval", seed=seed)}
    assert held_out and not held_out & {t.id for t in train + other}
    assert (
        len({t.id for t in train})
        == len(train)
        == (200 if name != "ultimatum" else len(train))
        > 100
    )
    assert {t.source for t in train} == {name} and all(t.answer is None for t in train)


@pytest.mark.parametrize(("name", "cls"), SETS.items())
def test_every_task_can_be_played(name: str, cls: type[Game]) -> None:
    for task in tasks(name, "eval", num_tasks=20):
        game = cls(["a", "b"])
        first = "0 apples for 0 nuts" if name == "exchange" else "0"
        team = fake_team(
            game.specs,
            lambda agent, messages, first=first: (
                f"Move: {'offer ' + first if agent == 'a' else 'accept'}"
            ),
        )
        assert json.loads(asyncio.run(game.run(task.public(), team)))["ended"] == "deal"


def test_numbers_of_the_sets_are_what_they_should_be() -> None:
    assert {
        t.meta["total"] for t in tasks("ultimatum", "train", least=100, most=109, num_tasks=9)
    } <= set(range(100, 110))
    for task in tasks("trade", "train", highest=9):
        assert 0 <= task.meta["own"][0]["cost"] < task.meta["own"][1]["value"] <= 9
    assert (
        len(tasks("trade", "train", highest=9)) + len(tasks("trade", "eval", highest=9)) == 45
    )  # all pairs of ten prices
    assert {
        t.meta["own"][1]["value"] - t.meta["own"][0]["cost"]
        for t in tasks("trade", "train", highest=9, gap=5)
    } == {5, 6, 7, 8, 9}
    for task in tasks("exchange", "train", most=4, worth=1, num_tasks=50):
        assert all(0 <= n <= 4 for pair in task.meta["holdings"] for n in pair)
        assert [own["worth"] for own in task.meta["own"]] == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("name", "args", "problem"),
    [
        (
            "ultimatum",
            {"least": 9, "most": 8},
            "task_args.least: expected a whole number from 1 to 8, got 9",
        ),
        ("trade", {"highest": 0}, "task_args.highest: expected a whole number from 1, got 0"),
        ("trade", {"gap": 100}, "task_args.gap: expected a whole number from 0 to 99, got 100"),
        ("exchange", {"worth": 0}, "task_args.worth"),
        ("exchange", {"most": 0}, "task_args.most"),
        ("trade", {"eval_fraction": 2}, "task_args.eval_fraction"),
    ],
)
def test_wrong_numbers_are_named(name: str, args: dict[str, int], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        tasks(name, "train", **args)


def episode(payoffs: dict[str, float], ended: str = "deal", spoke: str = "ab") -> Episode:
    record = {"players": ["b", "a"], "payoffs": payoffs, "ended": ended}
    turns = tuple(Turn(i, name) for i, name in enumerate(spoke))
    return Episode("e", "g", Task("t", ""), turns=turns, output=json.dumps(record))


def scored(game: Episode) -> dict[tuple[str, str | None], float]:
    names = ["first_payoff", "second_payoff", "deal", "payoff", "won"]
    rewards = resolve_rewards([f"marlora.rollouts.rewards.games:{name}" for name in names])
    return {(r.name, r.agent): r.value for r in asyncio.run(score(game.task, game, rewards))}


def test_rewards_are_the_referees_payoffs() -> None:
    assert scored(episode({"a": 12.0, "b": -3.0})) == {
        ("first_payoff", None): -3.0,
        ("second_payoff", None): 12.0,
        ("deal", None): 1.0,
        ("payoff", "a"): 12.0,
        ("payoff", "b"): -3.0,
        ("won", "a"): 1.0,
        ("won", "b"): 0.0,
    }


def test_an_even_game_is_half_won_and_who_was_not_asked_has_no_reward() -> None:
    found = scored(episode({"a": 0.0, "b": 0.0}, ended="illegal", spoke="b"))
    assert found[("won", "b")] == 0.5 and found[("deal", None)] == 0.0
    assert ("won", "a") not in found and ("payoff", "a") not in found


def test_a_record_that_is_none_cannot_be_scored() -> None:
    other = Episode("e", "g", Task("t", ""), turns=(Turn(0, "a"),), output="42")
    (reward,) = asyncio.run(score(other.task, other, [payoff]))
    assert math.isnan(reward.value) and "no game's record" in reward.text
    assert isinstance(reward, Reward)
