"""Task sets of the two-player games of `marlora.agents.games`; `rewards/games.py` scores them.

Task sets, by `tasks: marlora.rollouts.tasks.games:NAME`: `ultimatum`, `trade`, `exchange`. Every
task is another set of numbers; a hash of these decides whether it is held out, whatever the seed.
Rewards, by `rewards: [marlora.rollouts.rewards.games:NAME]`: `payoff` and `won` are each player's
own, so that credit by agent follows them; `first_payoff`, `second_payoff` and `deal` are the
team's, for evaluations, whose accuracy is the first reward of the list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ...agents.lookup import trusted
from ...agents.types import SettingError, Task
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
    tasks: dict[str, Task] = {}
    for task in of_split(drawn, split, eval_fraction, lambda task: task.id):
        tasks.setdefault(task.id, task)
        if len(tasks) == count:
            break
    return iter(tasks.values())
