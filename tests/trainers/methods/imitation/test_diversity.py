"""Diversity against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from marlora.agents.types import SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.methods.imitation.diversity import (
    consensus,
    dissimilarity,
    divergence,
    embedding_distance,
)

A, B = (0.8, 0.2), (0.3, 0.7)  # two agents' shares of two correct chains


def table(*agents: tuple[float, ...]) -> dict[tuple[str, str], float]:
    """nll[n, k] = -sum_y p_n(y) log p_k(y): what the mean over ever more samples goes to."""
    names = "ab"[: len(agents)]
    return {
        (n, k): -sum(p * math.log(q) for p, q in zip(one, two, strict=True))
        for n, one in zip(names, agents, strict=True)
        for k, two in zip(names, agents, strict=True)
    }


def test_own_data_keeps_two_agents_apart_and_pooled_data_does_not() -> None:
    nll = table(A, B)
    own = divergence(nll, ["a", "b"])
    assert own.cross_nll == pytest.approx(1.114031, abs=1e-6)
    assert (nll["a", "b"] - nll["a", "a"], nll["b", "a"] - nll["b", "b"]) == pytest.approx(
        (0.534111, 0.582685), abs=1e-6
    )
    assert own.kl == pytest.approx((0.534111 + 0.582685) / 2, abs=1e-6)
    mean = tuple((p + q) / 2 for p, q in zip(A, B, strict=True))
    assert mean == pytest.approx((0.55, 0.45))
    pooled = divergence(table(mean), ["a", "a"])
    assert pooled.cross_nll == pytest.approx(0.688139, abs=1e-6) and pooled.kl == 0.0
    assert own.cross_nll > pooled.cross_nll


def test_agents_count_not_policies() -> None:
    """Of three agents two share a policy: of six ordered pairs two are within it."""
    found = divergence(table(A, B), ["a", "a", "b"])
    nll = table(A, B)
    assert found.cross_nll == pytest.approx(
        (2 * nll["a", "a"] + 2 * nll["a", "b"] + 2 * nll["b", "a"]) / 6
    )
    with pytest.raises(ValueError, match="at least two agents"):
        divergence(nll, ["a"])


def test_dissimilarity_of_three_vectors() -> None:
    assert dissimilarity([(1, 0), (0, 1), (0.7071, 0.7071)]) == pytest.approx(0.528595, abs=1e-6)
    assert dissimilarity([(1, 0), (0, 0)]) == 1.0
    with pytest.raises(ValueError, match="at least two vectors"):
        dissimilarity([(1, 0)])


def debate(last: str, output: str | None, error: str | None = None) -> Episode:
    turns = tuple(
        Turn(n, name, text=text)
        for n, (name, text) in enumerate(zip("abc", last.split(), strict=True))
    )
    return Episode("e", "g", Task("t", ""), turns=turns, output=output, error=error)


def test_consensus_is_the_share_that_agrees_with_the_majority() -> None:
    played = [
        debate("8 8 5", "8"),
        debate("8 8.0 8", "8"),
        debate("1 2 3", "2"),
        debate("1 2 3", None, "lost"),
        debate("x y z", ""),
    ]
    assert consensus(played, "abc") == pytest.approx((2 / 3 + 1 + 1 / 3) / 3)
    assert math.isnan(consensus([debate("x y z", "")], "abc"))


def test_embedding_distance_takes_the_users_function() -> None:
    places = {"8": (1.0, 0.0), "5": (0.0, 1.0)}
    played = [debate("8 8 5", "8"), debate("8 8 8", "8"), debate("5 5 5", None, "lost")]
    assert embedding_distance(
        played, "abc", lambda texts: [places[t] for t in texts]
    ) == pytest.approx((2 / 3 + 0) / 2)
    with pytest.raises(
        SettingError, match="embedder: expected a vector per text, got 1 for 6 texts"
    ):
        embedding_distance(played, "abc", lambda texts: [(1.0,)])
