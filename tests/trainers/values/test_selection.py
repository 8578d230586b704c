"""Selection of parents: AFlow's soft mixed probabilities and GEPA's Pareto draw by the numbers of
their papers and code."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from marlora.trainers.values.search import Candidate
from marlora.trainers.values.selection import (
    best,
    current,
    gumbel_order,
    gumbel_top,
    pareto,
    pareto_wins,
    soft_mixed,
    soft_mixed_probabilities,
    start_and_best,
    whole_archive,
)

PAPER, CODE = (0.2, 0.4), (0.3, 0.2)  # lambda and alpha


def pool(*rows):
    """A candidate per row of scores by task; a number is the score of one task."""
    return tuple(
        Candidate({"p": i}, id=str(i), scores=row if isinstance(row, dict) else {"t": row})
        for i, row in enumerate(rows)
    )


def tasks(*scores):
    return {f"t{i}": score for i, score in enumerate(scores)}


def near(*values):
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "constants", "expected"),
    [
        ((60, 55, 50, 40), CODE, (0.535063, 0.244248, 0.137263, 0.083426)),
        ((60, 55, 50, 40), PAPER, (0.743249, 0.143821, 0.062697, 0.050233)),
        ((0.60, 0.55, 0.50, 0.40), CODE, (0.253070, 0.251298, 0.249544, 0.246088)),
        ((0.60, 0.55, 0.50, 0.40), PAPER, (0.257034, 0.252934, 0.248916, 0.241116)),
        ((50, 50, 50, 50), PAPER, (0.25, 0.25, 0.25, 0.25)),
        ((69.759842, 12.431425), CODE, (0.849993, 0.150007)),
        ((69.759842, 12.431425), PAPER, (0.9, 0.1)),
        ((60, 55), (1.0, 0.4), (0.5, 0.5)),
        ((1000, 0), (0.0, 100.0), (1.0, 0.0)),
    ],
)
def test_soft_mixed_probabilities(scores, constants, expected):
    """AFlow's sheet, unit facts 1 to 3."""
    assert tuple(soft_mixed_probabilities(scores, *constants)) == near(*expected)


def test_soft_mixed_takes_the_start_and_the_best_others():
    """AFlow's sheet, unit fact 5, with round 1 as candidate 0; a sample of 1 is one candidate."""
    found = pool(0.40, 0.60, 0.55, 0.50, 0.30)
    assert [c.id for c in start_and_best(found, 4)] == ["1", "2", "3", "0"]
    assert [c.id for c in start_and_best(found, 2)] == ["1", "0"]
    assert [c.id for c in start_and_best(found, 1)] == ["0"]
    assert [c.id for c in start_and_best(found, 9)] == ["1", "2", "3", "0", "4"]


def test_soft_mixed_draws_by_percent():
    """Means .60, .55, .50, .40: the paper's .743, .144, .063, .050, not the near quarter of
    fractions. 4,000 draws have a standard error below .008."""
    rng, select = random.Random(0), soft_mixed(4)
    drawn = Counter(select(pool(0.40, 0.60, 0.55, 0.50, 0.30), rng)[0].id for _ in range(4000))
    shares = [drawn[id] / 4000 for id in ("1", "2", "3", "0", "4")]
    assert shares == pytest.approx([0.743249, 0.143821, 0.062697, 0.050233, 0.0], abs=0.03)


@pytest.mark.parametrize("settings", [(-0.1, 0.4), (1.1, 0.4), (0.2, -1)])
def test_settings_of_soft_mixed_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected uniform from 0 to 1 and sharpness from 0"):
        soft_mixed_probabilities([1.0], *settings)
    with pytest.raises(ValueError, match="sample: expected at least 1, got 0"):
        soft_mixed(0)


def test_current_best_and_the_whole_archive():
    found, rng = pool(0.1, 0.9, 0.9), random.Random(0)
    assert best(found, rng) == (found[1],)
    assert whole_archive(found, rng) == found
    assert current(found, rng) == (found[0],)
    adopted = (
        found[0],
        *(Candidate(c.values, id=c.id, adopted=3 - i) for i, c in enumerate(found[1:])),
    )
    assert current(adopted, rng)[0].id == "1"


def test_pareto_counts_the_tasks_on_which_a_candidate_is_best():
    """Tasks t0 and t1 are won by 0, t2 by 1, t3 by both: 3 and 2. Candidate 2 wins none."""
    found = pool(tasks(1, 1, 0, 0.5), tasks(0, 0, 1, 0.5), tasks(0.9, 0.9, 0.9, 0.4))
    assert pareto_wins(found) == {"0": 3, "1": 2}


def test_a_superfluous_candidate_is_not_drawn():
    """Candidate 2 is best on t1 only, where 0 is so too; it goes. So does one equal to 0, the
    earlier of them first; one stays."""
    assert pareto_wins(pool(tasks(1, 1, 0), tasks(0, 0, 1), tasks(0, 1, 0))) == {"0": 2, "1": 1}
    assert pareto_wins(pool(tasks(1, 1), tasks(1, 1))) == {"1": 2}


def test_of_candidates_that_cover_one_another_the_weaker_goes():
    """Each of three shares its two tasks with the others: 0 has the lowest mean and goes, then
    neither 1 nor 2 is covered."""
    found = pool(tasks(1, 1, 0), tasks(1, 0.5, 1), tasks(0.75, 1, 1))
    assert pareto_wins(found) == {"1": 2, "2": 2}


def test_pareto_draws_in_proportion_to_the_tasks_won():
    rng, found = random.Random(0), pool(tasks(1, 1, 0, 0.5), tasks(0, 0, 1, 0.5))
    drawn = Counter(pareto(found, rng)[0].id for _ in range(3000))
    assert drawn["0"] / 3000 == pytest.approx(3 / 5, abs=0.03)
    assert pareto(found[:1], rng) == found[:1]


@pytest.mark.parametrize("select", [pareto, soft_mixed(3)])
def test_the_generator_decides(select):
    found = pool(tasks(1, 0, 0), tasks(0, 1, 0), tasks(0, 0, 1))

    def drawn(seed):
        rng = random.Random(seed)
        return [select(found, rng)[0].id for _ in range(20)]

    assert drawn(0) == drawn(0) != drawn(1)


def test_gumbel_order_adds_noise_to_scores():
    """Fact U5 of LLM-AutoDiff: scores .5 to .9, draws of numpy's default_rng(42), temperature 0.6,
    noise 0.4: the order is 2, 3, 0. Without noise the highest score comes first."""
    scores, draws = [0.5, 0.6, 0.7, 0.8, 0.9], [0.77396, 0.43888, 0.8586, 0.69737, 0.09418]
    assert gumbel_order(scores, draws, 0.6, 0.4)[:3] == [2, 3, 0]
    assert gumbel_order(scores, draws, 0.6, 0.0) == [4, 3, 2, 1, 0]


def test_gumbel_top_takes_some_of_the_last_candidates():
    candidates = pool(*[tasks(score) for score in (1.0, 0.1, 0.2, 0.3)])
    chosen = gumbel_top(2, kept=3, noise=0.0)(candidates, random.Random(0))
    assert [c.mean for c in chosen] == [0.3, 0.2], "the best is too old"
    drawn = {gumbel_top(1)(candidates, random.Random(n))[0].id for n in range(40)}
    assert len(drawn) > 1
