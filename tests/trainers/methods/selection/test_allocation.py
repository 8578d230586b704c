"""Scores, votes and the end of the search: unit facts of LLMSelector (arXiv:2502.14815), worked out
by hand."""

from __future__ import annotations

import itertools

import pytest

from marlora.trainers.methods.selection.allocation import (
    affordable,
    best_sets,
    choice,
    converged,
    module_score,
    votes,
    worth,
)

# best sets per task: {A, B}, {B}, {A, B, C}, {C}
SCORES = {
    "A": {"1": 1.0, "2": 0.0, "3": 0.0, "4": 0.0},
    "B": {"1": 1.0, "2": 1.0, "3": 0.0, "4": 0.0},
    "C": {"1": 0.0, "2": 0.0, "3": 0.0, "4": 1.0},
}


def test_every_task_votes_for_all_of_its_best_models() -> None:
    assert best_sets(SCORES) == {"1": ["A", "B"], "2": ["B"], "3": ["A", "B", "C"], "4": ["C"]}
    assert votes(best_sets(SCORES)) == {"A": 2, "B": 3, "C": 2}
    assert worth(SCORES, "votes") == {"A": 0.5, "B": 0.75, "C": 0.5}
    assert choice(worth(SCORES, "votes"), "A") == "B"


def test_votes_are_not_means() -> None:
    """A is half right everywhere, B all right on one task of three: two tasks vote for A."""
    scores = {"A": {"1": 0.5, "2": 0.5, "3": 0.0}, "B": {"1": 0.4, "2": 0.4, "3": 1.0}}
    assert choice(worth(scores, "votes"), "B") == "A"
    assert worth(scores, "mean") == pytest.approx({"A": 1 / 3, "B": 0.6})
    assert choice(worth(scores, "mean"), "A") == "B"


def test_of_equal_models_the_current_one_then_the_cheapest_then_the_first() -> None:
    equal = {"A": 0.5, "B": 0.5, "C": 0.4}
    assert choice(equal, "B") == "B" and choice(equal, "C") == "A"
    assert choice(equal, "C", {"A": 2.0, "B": 1.0}) == "B"
    assert choice(equal, "C", {"A": 2.0}) == "B"  # without a price it costs nothing
    assert choice(equal, "A", {"A": 2.0}) == "A"


@pytest.mark.parametrize(
    ("correct", "guilt", "score"), [(1, 0, 1.5), (1, 1, 1.0), (1, 0.5, 1.25), (0, 0, 0.5)]
)
def test_what_a_model_is_worth_in_a_module(correct: float, guilt: float, score: float) -> None:
    assert module_score(correct, guilt, alpha=0.5, beta=1.0) == score


def test_it_ends_after_a_round_without_change() -> None:
    history = ["CC", "AC", "AB", "AB", "AB"]
    assert [converged(history[:n], 2) for n in range(1, 6)] == [False] * 4 + [True]
    assert len(history) - 2 - 1 == 2  # valid steps
    assert [converged(["A", "B", "B"][:n], 1) for n in (1, 2, 3)] == [False, False, True]
    assert not converged(["AA"], 2) and not converged(["AA", "AA"], 2)


def test_a_search_of_20_has_two_steps_of_ten_models() -> None:
    assert [affordable(spent, 20, 10) for spent in (0, 9, 18)] == [True, True, False]
    assert affordable(10**9, 0, 10)


def test_two_skilled_models_take_their_own_modules() -> None:
    """Locate A .95, B .5, C .6; solve A .1, B .95, C .6. From CC: A locates (.57), B solves
    (.9025), nothing more; one model everywhere has at most .475. Six allocations are measured
    instead of nine."""
    locate, solve = {"A": 0.95, "B": 0.5, "C": 0.6}, {"A": 0.1, "B": 0.95, "C": 0.6}
    team = {(x, y): locate[x] * solve[y] for x, y in itertools.product("ABC", repeat=2)}
    assert len(team) == 9 and [team[k, k] for k in "ABC"] == pytest.approx([0.095, 0.475, 0.36])
    history, measured, values = [("C", "C")], [], []
    for step in range(4):
        module, now = step % 2, history[-1]
        tried = {k: tuple(k if m == module else now[m] for m in (0, 1)) for k in "ABC"}
        measured += [*tried.values()]
        best = choice({k: team[each] for k, each in tried.items()}, now[module])
        history.append(tried[best])
        values.append(team[tried[best]])
    assert history[1:] == [("A", "C"), ("A", "B"), ("A", "B"), ("A", "B")]
    assert values == pytest.approx([0.57, 0.9025, 0.9025, 0.9025])
    assert converged(history, 2) and max(team.values()) == team["A", "B"]
    assert len(measured[:6]) == 6
