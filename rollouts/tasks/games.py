"""Tasks and rewards of the two-player games of `marlora.agents.games`.

Task sets, by `tasks: marlora.rollouts.tasks.games:NAME`: `ultimatum`, `trade`, `exchange`. Every
task is another set of numbers; a hash of these decides whether it is held out, whatever the seed.
Rewards, by `rewards: [marlora.rollouts.tasks.games:NAME]`: `payoff` and `won` are each player's
own, so that credit by agent follows them; `first_payoff`, `second_payoff` and `deal` are the
team's, for evaluations, whose accuracy is the first reward of the list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from ...agents.lookup import trusted
from ...agents.types import SettingError, Task
from ..types import Episode, Reward
from .datasets import of_split


@trusted("tasks")
def ultimatum(
    *,
    split: str,
    seed: int,
    num_tasks: int = 200,
    eval_fraction: float = 0.2,
    least: int = 10,
    most: int = 200,
) -> Iterator[Task]:
    """Sums of money from `least` to `most` dollars, each once. The paper's 100 is one of them."""

    def draw(rng: random.Random) -> Task:
        total = rng.randint(least, most)
        prompt = (
            f"Two players may share {total} dollars. They offer each other parts, in whole dollars,"
            " until one offer is accepted."
        )
        return Task(f"ultimatum:{total}", prompt, source="ultimatum", meta={"total": total})

    _between("least", 1, least, most)
    return _tasks(draw, split, seed, num_tasks, eval_fraction)


@trusted("tasks")
def trade(
    *,
    split: str,
    seed: int,
    num_tasks: int = 200,
    eval_fraction: float = 0.2,
    highest: int = 99,
    gap: int = 1,
    item: str = "lamp",
) -> Iterator[Task]:
    """Every cost and value, the value higher by at least `gap`, with prices from 0 to `highest`: a
    deal from which both gain exists."""

    def draw(rng: random.Random) -> Task:
        cost = rng.randint(0, highest - gap)
        value = rng.randint(cost + gap, highest)
        prompt = (
            f"A {item} is for sale. Seller and buyer name prices, whole numbers from 0 to"
            f" {highest}, until one is accepted."
        )
        meta = {"highest": highest, "own": [{"cost": cost}, {"value": value}]}
        return Task(f"trade:{cost}:{value}:{highest}", prompt, source="trade", meta=meta)

    _between("highest", 1, highest, None)
    _between("gap", 0, gap, highest)
    return _tasks(draw, split, seed, num_tasks, eval_fraction)


@trusted("tasks")
def exchange(
    *,
    split: str,
    seed: int,
    num_tasks: int = 200,
    eval_fraction: float = 0.2,
    most: int = 30,
    worth: int = 9,
) -> Iterator[Task]:
    """Holdings of 0 to `most` of two kinds, a unit of which is worth 1 to `worth` to a player. With
    `worth` 1 one's gain is the other's loss, as in the paper."""

    def draw(rng: random.Random) -> Task:
        holdings = [[rng.randint(0, most) for _ in range(2)] for _ in range(2)]
        worths = [[rng.randint(1, worth) for _ in range(2)] for _ in range(2)]
        numbers = "-".join(str(n) for pair in (*holdings, *worths) for n in pair)
        meta = {
            "kinds": ["apples", "nuts"],
            "holdings": holdings,
            "own": [{"worth": pair} for pair in worths],
        }
        prompt = (
            "Two players hold apples and nuts. They propose swaps of some of one kind for some of"
            " the other, until one is accepted."
        )
        return Task(f"exchange:{numbers}", prompt, source="exchange", meta=meta)

    _between("worth", 1, worth, None)
    _between("most", 1, most, None)
    return _tasks(draw, split, seed, num_tasks, eval_fraction)


def _between(name: str, low: int, value: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        raise SettingError(
            f"task_args.{name}: expected a whole number from"
            f" {low}{'' if high is None else f' to {high}'}, got {value}"
        )


def _tasks(
    draw: Callable[[random.Random], Task], split: str, seed: int, count: int, eval_fraction: float
) -> Iterator[Task]:
    """Different tasks of a split, in an order that the seed gives. A small game has fewer than
    `count`."""
    rng = random.Random(f"game {seed}")
    drawn = (draw(rng) for _ in range(100 * count))
    found: dict[str, Task] = {}
    for task in of_split(drawn, split, eval_fraction, lambda task: task.id):
        found.setdefault(task.id, task)
        if len(found) == count:
            break
    return iter(found.values())


# rewards


@trusted("reward")
def payoff(task: Task, episode: Episode) -> list[Reward]:
    """What each player has of the game, as the referee says."""
    return _each(episode, "payoff", lambda own, other: own)


@trusted("reward")
def won(task: Task, episode: Episode) -> list[Reward]:
    """1 for the player with the higher payoff, 0 for the other, 1/2 for both if they are equal."""
    return _each(episode, "won", lambda own, other: 0.5 if own == other else float(own > other))


@trusted("reward")
def first_payoff(task: Task, episode: Episode) -> float:
    """Payoff of the player who moves first (the seller)."""
    return _payoffs(episode)[0][1]


@trusted("reward")
def second_payoff(task: Task, episode: Episode) -> float:
    """Payoff of the player who moves second (the buyer)."""
    return _payoffs(episode)[1][1]


@trusted("reward")
def deal(task: Task, episode: Episode) -> float:
    """1 if the players agreed, else 0."""
    return float(_record(episode)["ended"] == "deal")


def _payoffs(episode: Episode) -> list[tuple[str, float]]:
    """Player and payoff, in the order in which they move."""
    record = _record(episode)
    return [(player, float(record["payoffs"][player])) for player in record["players"]]


def _each(episode: Episode, name: str, value: Callable[[float, float], float]) -> list[Reward]:
    """A reward for each player that was asked, from its own and the other's payoff."""
    spoke = {turn.agent for turn in episode.turns}
    (first, one), (second, two) = _payoffs(episode)
    given = ((first, value(one, two)), (second, value(two, one)))
    return [
        Reward(name, reward, agent=player, source="referee")
        for player, reward in given
        if player in spoke
    ]


def _record(episode: Episode) -> dict[str, Any]:
    """What the referee wrote: the output of every `Game`."""
    record = json.loads(episode.output or "{}")
    if not isinstance(record, dict) or "payoffs" not in record:
        raise ValueError(
            "the output is no game's record; this reward is for systems of marlora.agents.games"
        )
    return record
