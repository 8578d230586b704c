"""Statistics of comparisons against numbers worked out by hand, or known from tables."""

from __future__ import annotations

import math
import random

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.compare import statistics as st


def test_means_and_errors_cover_tasks_and_seeds() -> None:
    """Means of tasks 1 and 1/2, of seeds 1/2 and 1: both have variance 1/8, so se^2 = 1/16 + 1/16,
    with (1/8)^2 / (2 (1/16)^2) = 2 degrees of freedom; t(.975, 2) = 4.30265."""
    table = {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}}
    assert st.over_seeds(table) == {"a": 1.0, "b": 0.5}
    assert st.by_seed(table) == {0: 0.5, 1: 1.0}
    assert st.mean(table) == 0.75
    error, freedom = st.standard_error(table)
    assert (error**2, freedom) == pytest.approx((1 / 8, 2))
    low, high = st.around(0.75, error, freedom)
    assert (low + high) / 2 == pytest.approx(0.75)
    assert (high - low) / 2 == pytest.approx(4.30265 * math.sqrt(1 / 8), rel=1e-5)
    assert st.mean_interval(table) == (0.0, 1.0)  # no score is beyond
    wider = {seed: {task: 2 * score for task, score in own.items()} for seed, own in table.items()}
    assert st.mean_interval(wider) == pytest.approx((1.5 - 2 * (high - 0.75), 2 * high))


def test_one_seed_has_the_interval_that_evaluations_have() -> None:
    """Wilson's of 8 right of 10: .4902 .. .9433."""
    table = {3: {str(n): float(n < 8) for n in range(10)}}
    assert st.mean_interval(table) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_tasks_that_are_always_right_are_still_a_sample() -> None:
    """Ten of ten: Wilson's .7225 .. 1, with one seed or several that agree."""
    scores = {str(n): 1.0 for n in range(10)}
    assert st.mean_interval({0: scores, 1: scores}) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_scores_that_do_not_vary_are_still_a_sample() -> None:
    """Half of everything with two seeds: no spread over tasks or seeds. z^2 / (96 + z^2) = .03848
    to both sides; of 4 tasks .48990."""

    def halves(tasks: int) -> dict[int, dict[str, float]]:
        own = {str(n): 0.5 for n in range(tasks)}
        return {0: own, 1: own}

    assert st.mean_interval(halves(96)) == pytest.approx((0.5 - 0.03848, 0.5 + 0.03848), abs=1e-5)
    assert st.mean_interval(halves(4)) == pytest.approx((0.0101, 0.9899), abs=1e-4)


def test_seeds_that_were_scored_on_different_tasks() -> None:
    """Task b has seed 0 alone and c seed 1 alone: means 1, 0 and 1."""
    table = {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "c": 1.0}}
    assert st.over_seeds(table) == {"a": 1.0, "b": 0.0, "c": 1.0}
    assert st.mean(table) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.30265), (10, 2.22814), (200, 1.97190), (math.inf, 1.95996)],
)
def test_quantiles_are_those_of_the_tables(freedom: float, value: float) -> None:
    assert st.student_quantile(0.975, freedom) == pytest.approx(value, abs=2e-4)


def test_tails_have_closed_forms_for_one_and_two_degrees_of_freedom() -> None:
    """1 - 2 atan(t) / pi, and 1 - t / sqrt(2 + t^2)."""
    for t in (0.0, 0.5, 1.0, 2.0, 8.0):
        assert st.student_tail(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-7)
        assert st.student_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-7)


def table_of(*differences: float) -> dict[int, dict[str, float]]:
    return {0: {str(n): d for n, d in enumerate(differences)}}


def test_p_values_are_exact_and_corrected_by_holm() -> None:
    """Six of six tasks gained: 2 / 2^6; four of four: 2 / 2^4; one gained, one lost: 1. In order of
    size they count 3, 2 and 1 times."""
    pairs = [
        st.Pair("team", "four", table_of(1, 1, 1, 1)),
        st.Pair("team", "six", table_of(1, 1, 1, 1, 1, 1)),
        st.Pair("team", "none", table_of(1, -1, 0)),
    ]
    rows = {row["to"]: row for row in st.tested(pairs)}
    assert [rows[n]["p"] for n in ("six", "four", "none")] == [2 / 64, 2 / 16, 1.0]
    assert [rows[n]["p_holm"] for n in ("six", "four", "none")] == [6 / 64, 4 / 16, 1.0]
    assert (rows["none"]["gained"], rows["none"]["lost"], rows["none"]["difference"]) == (1, 1, 0)


def test_a_gain_of_one_seed_alone_is_no_gain_of_the_method() -> None:
    """Forty tasks are all gained with seed 0 and none with seed 1. Over tasks alone that is beyond
    doubt; the seeds' means 1 and 0 have an error of 1/2 with one degree of freedom: p = 1/2."""
    many = {str(n): 1.0 for n in range(40)}
    pair = st.Pair("team", "lucky", {0: many, 1: dict.fromkeys(many, 0.0)})
    (row,) = st.tested([pair])
    assert row["difference"] == 0.5 and row["p"] == pytest.approx(0.5)
    assert row["ci95"] == [-1.0, 1.0]  # .5 -+ 12.7 / 2, and no difference is beyond
    assert row["by_seed"] == {"0": 1.0, "1": 0.0}


@pytest.mark.parametrize(
    ("differences", "low", "high"),
    [
        ([0.0] * 96, -0.03848, 0.03848),
        ([1.0] * 96, 1 - 0.03848, 1.0),
        ([-1.0] + [0.0] * 95, -1 / 96 - 0.03848, -1 / 96 + 0.03848),
        ([0.0] * 4, -0.48990, 0.48990),
    ],
)
def test_where_nothing_differs_the_interval_has_a_width(
    differences: list[float], low: float, high: float
) -> None:
    """z^2 / (96 + z^2) = .03848: what Wilson's and Tango's intervals say of 0 of 96. Tango's of one
    lost of 96 is -.0567 .. +.0285."""
    (row,) = st.tested([st.Pair("a", "b", table_of(*differences))])
    assert row["ci95"] == pytest.approx([low, high], abs=1e-5)
    assert row["num_tasks"] == len(differences)


def test_of_scores_that_are_no_shares_spreads_alone_are_known() -> None:
    """Rewards of any size have no scale of their own, and no bound."""
    pair = st.pair("a", "b", {0: {"x": 5.0, "y": 7.0}}, {0: {"x": 9.0, "y": 11.0}})
    (row,) = st.tested([pair])
    assert not pair.shares and row["ci95"] == [4.0, 4.0]


def test_a_control_counts_only_with_the_seeds_that_both_have() -> None:
    """The control has seed 0 alone; seed 1 of the arm is not set against it, although it has the
    same tasks. With another seed alone there is nothing to compare."""
    control = {0: {"a": 0.0, "b": 0.0}}
    arm = {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}}
    pair = st.pair_by_seed("control", "arm", control, arm)
    assert pair is not None and pair.differences == {0: {"a": 1.0, "b": 0.0}}
    assert st.pair_by_seed("control", "arm", {2: {"a": 0.0}}, arm) is None


def test_pairs_are_taken_by_task_and_by_seed_where_both_have_it() -> None:
    reference = {7: {"a": 1.0, "b": 0.0, "c": 1.0}}
    arm = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 0.0, "b": 1.0}}
    against_team = st.pair("team", "arm", reference, arm)
    assert against_team.differences == {0: {"a": 0.0, "b": 1.0}, 1: {"a": -1.0, "b": 1.0}}
    control = {0: {"a": 1.0, "b": 0.0}, 1: {"a": 1.0, "b": 1.0}}
    pair = st.pair_by_seed("control", "arm", control, arm)
    assert pair is not None and pair.differences == {
        0: {"a": 0.0, "b": 1.0},
        1: {"a": -1.0, "b": 0.0},
    }
    with pytest.raises(SettingError, match="different tasks"):
        st.pair("team", "arm", {0: {"x": 1.0}}, arm)


def test_the_share_of_seeds_below_counts_seeds_not_tasks() -> None:
    pair = st.Pair("team", "arm", {0: {"a": -1.0, "b": 0.0}, 1: {"a": 0.0}, 2: {"a": 1.0}})
    assert st.share_below(pair) == pytest.approx(1 / 3)


def test_what_a_number_of_tasks_can_show() -> None:
    """q = 1.95996 + .84162; of ten comparisons 2.80703 + .84162."""
    assert st.detectable(0.5, 100, 1) == pytest.approx(2.80158 * 0.05, rel=1e-5)
    assert st.detectable(0.5, 100, 10) == pytest.approx(3.64865 * 0.05, rel=1e-5)
    assert st.detectable(0.0, 100, 1) == pytest.approx(7.84886 / 107.84886, rel=1e-5)


def test_a_gain_of_the_detectable_size_is_shown_in_four_of_five_trials() -> None:
    """Simulated: right or wrong, gains alone, one comparison. The control gains nothing and is
    shown in at most one of twenty."""
    rng, tasks = random.Random(0), 150
    gain = st.detectable(0.0, tasks, 1)

    def shown(chance: float) -> float:
        hits = 0
        for _ in range(300):
            differences = [float(rng.random() < chance) for _ in range(tasks)]
            (row,) = st.tested([st.Pair("a", "b", table_of(*differences))])
            hits += row["ci95"][0] > 0
        return hits / 300

    assert shown(gain) > 0.75
    assert shown(0.0) == 0.0


def test_the_noise_floor_of_three_plays() -> None:
    """Means 1, 1/2 and 1/2: variance 1/12. Within task a the scores do not move, within b they are
    1, 0, 0 (variance 1/3): pooled 1/6, of a difference twice that."""
    plays = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0}]
    floor = st.repeats(plays)
    assert floor["means"] == [1.0, 0.5, 0.5] and floor["largest_difference"] == 0.5
    assert floor["sd"] == pytest.approx(math.sqrt(1 / 12))
    assert st.spread_of_repeats(plays) == pytest.approx(math.sqrt(1 / 3))
