"""Topologies of building blocks: how many agents one takes, how blocks' influence becomes chances,
and which topologies are drawn by them. Pure Python, without a model (MASS)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .....agents.programs.building_blocks import VALUES, predictors

# the least of a block that shows what it does; the others are left out
MINIMAL: Mapping[str, Mapping[str, int]] = {
    "summarize": {"summarize": 1},
    "reflect": {"reflect": 1},
    "debate": {"debate": 1},
    "aggregate": {"aggregate": 3},
    "execute": {"execute": 1, "reflect": 1},
}
Topology = Mapping[str, int]  # the integer of every block
ACTIVATIONS = ("influential", "printed")


def topology(chosen: Mapping[str, int] | None = None) -> dict[str, int]:
    """The integers of all blocks: those chosen, the others left out; none chosen is the predictor
    alone."""
    return {name: known[0] for name, known in VALUES.items()} | dict(chosen or {})


def space_size(blocks: Sequence[str]) -> int:
    """How many topologies these blocks make."""
    return math.prod(len(VALUES[name]) for name in blocks)


def num_agents(shape: Topology) -> int:
    """Agents of a topology, by a rule of ours: its predictors, the aggregator of several, one for
    every round of summaries, reflection and debate, and the executor."""
    rounds = shape["summarize"] + shape["reflect"] + shape["debate"]
    return predictors(shape) + (shape["aggregate"] > 1) + rounds + shape["execute"]


def fault(shape: Topology, max_agents: int) -> str:
    """Why a topology is rejected; "" if it is not."""
    if shape["execute"] and not shape["reflect"]:
        return "execute without reflect"
    return "too many agents" if num_agents(shape) > max_agents else ""


def influence(block: float, predictor: float, floor: float) -> float:
    """E(a_i*) / E(a_0*), with a score of 0 of the predictor taken as `floor`."""
    return block / max(predictor, floor)


def chances(influences: Mapping[str, float], temperature: float) -> dict[str, float]:
    """softmax(I / t): how likely a block takes part. Raises `ValueError` unless t is above 0."""
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    top = max(influences.values())
    powers = {name: math.exp((value - top) / temperature) for name, value in influences.items()}
    total = math.fsum(powers.values())
    return {name: power / total for name, power in powers.items()}


def activation(chance: float, rule: str) -> float:
    """The probability that a block takes part: p (`influential`), or 1 - p, as the first version of
    the paper prints it (`printed`), by which weak blocks take part more often."""
    return chance if rule == "influential" else 1 - chance


def drawn(
    blocks: Mapping[str, float], rng: random.Random, rule: str = "influential"
) -> dict[str, int]:
    """A random topology: each block takes part by its chance, and then any of its integers but the
    one that leaves it out is as likely as the others."""
    chosen = {}
    for name, chance in blocks.items():
        if rng.random() <= activation(chance, rule):
            chosen[name] = rng.choice(VALUES[name][1:])
    return topology(chosen)


@dataclass
class Draws:
    """Topologies that were drawn, without repetition, and how many draws were rejected, by
    reason."""

    topologies: list[dict[str, int]] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)


def sample(
    blocks: Mapping[str, float],
    count: int,
    seed: int,
    *,
    max_agents: int,
    max_draws: int,
    rule: str = "influential",
) -> Draws:
    """Up to `count` different valid topologies by rejection sampling.

    Args:
        blocks: the chance of every block.
        max_agents: see `num_agents`.
        max_draws: where they are not found in so many draws, there are fewer.
        rule: see `activation`.
    """
    found = Draws()
    for shape in _stream(blocks, seed, max_draws, rule):
        why = "drawn before" if shape in found.topologies else fault(shape, max_agents)
        if why:
            found.rejected[why] = found.rejected.get(why, 0) + 1
            continue
        found.topologies.append(shape)
        if len(found.topologies) == count:
            break
    return found


def _stream(
    blocks: Mapping[str, float], seed: int, max_draws: int, rule: str
) -> Iterator[dict[str, int]]:
    rng = random.Random(seed)
    return (drawn(blocks, rng, rule) for _ in range(max_draws))
