"""Topologies of building blocks by the numbers of MASS's method sheet."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from marlora.agents.programs.building_blocks import VALUES
from marlora.trainers.methods.prompts.search.topologies import (
    MINIMAL,
    activation,
    chances,
    drawn,
    fault,
    influence,
    num_agents,
    sample,
    space_size,
    topology,
)

INFLUENCES = dict(
    zip(("aggregate", "reflect", "debate", "summarize"), (1.00, 1.05, 0.95, 1.10), strict=True)
)
P = (0.087144, 0.236883, 0.032059, 0.643914)


def test_influence_becomes_chances() -> None:
    """Fact U1: t 0.05 and 1."""
    assert list(chances(INFLUENCES, 0.05).values()) == pytest.approx(P, abs=1e-6)
    flat = (0.243447, 0.255929, 0.231574, 0.269050)
    assert list(chances(INFLUENCES, 1.0).values()) == pytest.approx(flat, abs=1e-6)
    assert chances({"a": 1000.0, "b": 0.0}, 0.05) == {"a": 1.0, "b": 0.0}, "no overflow"
    with pytest.raises(ValueError, match="temperature"):
        chances(INFLUENCES, 0)


def test_the_printed_rule_is_the_other_way_round() -> None:
    """Fact U2."""
    printed = [activation(p, "printed") for p in P]
    assert printed == pytest.approx((0.912856, 0.763117, 0.967941, 0.356086), abs=1e-6)
    assert [activation(p, "influential") for p in P] == list(P)


def test_sizes_of_the_papers_spaces() -> None:
    """Fact U3."""
    assert space_size(["aggregate", "reflect", "debate"]) == 125
    assert space_size(["summarize", "aggregate", "reflect", "debate"]) == 625
    assert space_size(["aggregate", "reflect", "debate", "execute"]) == 250


def test_no_block_takes_part_as_often_as_the_chances_say() -> None:
    """Fact U4: the product of 1 - p is 0.240103; every other block takes part by its own."""
    blocks = chances(INFLUENCES, 0.05)
    assert math.prod(1 - p for p in blocks.values()) == pytest.approx(0.240103, abs=1e-6)
    rng = random.Random(0)
    shapes = [drawn(blocks, rng) for _ in range(20_000)]
    alone = sum(shape == topology() for shape in shapes) / len(shapes)
    assert alone == pytest.approx(0.240103, abs=0.01)
    for name, p in blocks.items():
        active = [shape[name] for shape in shapes if shape[name] != VALUES[name][0]]
        assert len(active) / len(shapes) == pytest.approx(p, abs=0.01)
        counts = Counter(active)
        assert set(counts) == set(VALUES[name][1:]), "any integer but the one that leaves it out"
    other = [drawn(blocks, random.Random(n), "printed")["debate"] for n in range(400)]
    assert sum(map(bool, other)) > 360, "by the printed rule the weakest takes part most"


@pytest.mark.parametrize(
    ("chosen", "agents", "why"),
    [
        ({"aggregate": 9}, 10, ""),
        ({"aggregate": 9, "debate": 1}, 11, "too many agents"),
        ({}, 1, ""),
        ({"debate": 1}, 3, ""),
        ({"aggregate": 3, "reflect": 1, "debate": 1, "execute": 1}, 7, ""),
        ({"execute": 1}, 2, "execute without reflect"),
    ],
)
def test_agents_are_counted_and_too_many_rejected(
    chosen: dict[str, int], agents: int, why: str
) -> None:
    """Fact U5, and topologies that the paper found."""
    shape = topology(chosen)
    assert num_agents(shape) == agents and fault(shape, 10) == why


def test_the_minimal_forms_have_the_agents_of_the_sheet() -> None:
    counts = {name: num_agents(topology(shape)) for name, shape in MINIMAL.items()}
    assert counts == {"summarize": 2, "reflect": 2, "debate": 3, "aggregate": 4, "execute": 3}


def test_influence_is_a_ratio() -> None:
    """Fact U6."""
    assert influence(0.66, 0.60, 0.01) == pytest.approx(1.1)
    assert influence(0.5, 0.0, 0.01) == pytest.approx(50.0), "half a success for none"


def test_topologies_are_drawn_by_a_seed_without_repetition() -> None:
    blocks = chances(INFLUENCES, 0.3)
    found = sample(blocks, 10, 0, max_agents=10, max_draws=1000)
    assert len(found.topologies) == 10 == len({tuple(s.items()) for s in found.topologies})
    assert all(fault(shape, 10) == "" for shape in found.topologies)
    assert found.topologies == sample(blocks, 10, 0, max_agents=10, max_draws=1000).topologies
    assert found.topologies != sample(blocks, 10, 1, max_agents=10, max_draws=1000).topologies
    assert found.rejected.get("drawn before", 0) > 0


def test_rejection_ends_where_nothing_more_is_found() -> None:
    """Of at most one agent there is the predictor alone."""
    found = sample(chances(INFLUENCES, 1.0), 10, 0, max_agents=1, max_draws=300)
    assert found.topologies == [topology()]
    assert sum(found.rejected.values()) == 299 and set(found.rejected) == {
        "too many agents",
        "drawn before",
    }
