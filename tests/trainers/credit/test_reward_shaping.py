"""MAPoRL's reward and bonus against numbers worked out by hand, and what makes an answer
invalid."""

from __future__ import annotations

import pytest

from marlora.trainers.credit.reward_shaping import Table, influence, invalid, shaping

SCORES = [{"a": 0.2, "b": 0.9}, {"a": 0.6, "b": 0.8}, {"a": 0.9, "b": 0.7}]
WEIGHTS = (1.0, 2.0, 0.5, 0.25)


def table(*rows: list[float]) -> list[dict[str, float]]:
    return [dict(zip("abc", row, strict=False)) for row in rows]


def flat(found: Table) -> list[float]:
    return [value for row in found for value in row.values()]


def test_discounted_sum_shared_by_all():
    """R[0][a] = (.2 + .3 x .7 + .09 x .8) / 1.39."""
    assert flat(influence(SCORES)) == pytest.approx(
        [0.346763, 0.850360, 0.646154, 0.8, 0.9, 0.7], abs=1e-6
    )


def test_discounted_sum_of_ones_own():
    """R[0][a] = (.2 + .3 x .6 + .09 x .9) / 1.39."""
    found = influence(SCORES, share="individual")
    assert list(found[0].values()) == pytest.approx([0.331655, 0.865468], abs=1e-6)


@pytest.mark.parametrize("horizon", ["discounted_sum", "last", "current"])
@pytest.mark.parametrize("share", ["all", "individual"])
def test_equal_scores_are_everybodys_reward(horizon, share):
    assert flat(
        influence(table([0.4] * 3, [0.4] * 3, [0.4] * 3), horizon=horizon, share=share)
    ) == pytest.approx([0.4] * 9)


def test_other_horizons():
    assert flat(influence(SCORES, horizon="last")) == pytest.approx([0.8] * 6)
    assert flat(influence(SCORES, horizon="last", share="individual")) == [0.9, 0.7] * 3
    assert flat(influence(SCORES, horizon="current")) == pytest.approx(
        [0.55, 0.55, 0.7, 0.7, 0.8, 0.8]
    )
    assert flat(influence(SCORES, horizon="current", share="individual")) == flat(SCORES)


def test_a_penalty_enters_everybodys_sum_unless_it_is_the_owns_alone():
    punished = [SCORES[0], {"a": 0.6, "b": -10.0}, SCORES[2]]
    assert influence(punished)[0]["a"] == pytest.approx(-0.818705, abs=1e-6)
    private = influence(SCORES, own=punished)
    assert private[0] == influence(SCORES)[0]
    assert private[1] == pytest.approx(
        {"a": influence(SCORES)[1]["a"], "b": (-10 + 0.3 * 0.8) / 1.3}
    )


def test_what_was_not_played_is_in_no_sum():
    """After an early stop R[0][a] = (.2 + .3 x .7) / 1.3."""
    found = influence(SCORES[:2])
    assert len(found) == 2 and found[0]["a"] == pytest.approx(0.41 / 1.3) and found[1] == SCORES[1]


@pytest.mark.parametrize(
    ("rows", "where", "expected"),
    [
        (([0, 1], [1, 1], [1, 1]), (1, "a"), 1.0),  # it followed the right one
        (
            ([0, 0], [1, 0], [1, 1]),
            (1, "a"),
            1.75,
        ),  # right by itself (2), and the code punishes that the other then was (.25)
        (([0, 0], [1, 0], [1, 1]), (2, "b"), 1.0),
        (
            ([1, 0], [0, 0], [0, 0]),
            (1, "a"),
            -1.0,
        ),  # it followed the wrong one; no sentinel that needs .001
    ],
)
def test_bonus_with_the_codes_signs(rows, where, expected):
    found = shaping(table(*rows), WEIGHTS, "code_sign")
    assert found[where[0]][where[1]] == pytest.approx(expected)
    assert set(found[0].values()) == {0.0}


@pytest.mark.parametrize(
    ("rows", "where", "expected"),
    [
        (([0, 1], [1, 1]), (1, "a"), 2.0),  # persuaded: alpha1
        (([0, 0], [1, 0]), (1, "a"), 1.0),  # right against the majority: alpha0
        (([1, 0], [0, 0]), (1, "a"), -2.0),  # persuaded by the wrong one
        (([1, 1], [0, 1]), (1, "a"), -1.0),  # wrong against the majority
        (([0, 0], [0, 1]), (0, "a"), 0.5),  # a useful mistake: beta0
        (([1, 0], [1, 1]), (0, "a"), 0.25),  # it persuaded: beta1
        (([1, 1], [1, 0]), (0, "a"), -0.5),
        (([0, 1], [0, 0]), (0, "a"), -0.25),
        (([0, 0], [1, 0], [1, 1]), (1, "a"), 1.25),  # alpha0 and beta1
    ],
)
def test_bonus_with_the_papers_signs(rows, where, expected):
    assert shaping(table(*rows), WEIGHTS, "paper_sign")[where[0]][where[1]] == pytest.approx(
        expected
    )


def test_a_tie_among_the_others_gives_no_bonus_and_one_alone_is_never_persuaded():
    assert shaping(table([0, 0, 1], [1, 0, 1]), WEIGHTS, "paper_sign")[1]["a"] == 0.0
    assert shaping([{"a": 0}, {"a": 1}, {"a": 0}], WEIGHTS, "paper_sign") == [
        {"a": 0.0},
        {"a": 1.0},
        {"a": -1.0},
    ]
    assert shaping([{"a": 0}, {"a": 1}], WEIGHTS, "code_sign") == [{"a": 0.0}, {"a": 2.0}]


def test_no_bonus_without_change_or_when_there_is_none():
    for sign in ("paper_sign", "code_sign"):
        assert set(flat(shaping(table([0, 1], [0, 1], [0, 1]), WEIGHTS, sign))) == {0.0}
    assert set(flat(shaping(table([0, 1], [1, 1]), WEIGHTS, "none"))) == {0.0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("so it is \\boxed{5}", ""),
        ("so it is 5", "no answer in a box"),
        ("so \\boxed{ }", "no answer in a box"),
        ("\\boxed{5}", "5 words and signs, at least 6"),
        ("no no no \\boxed{5}", ""),  # three times are allowed
        ("no no no no \\boxed{5}", "'no' stands there more than 3 times"),
        ("a b a b a b a b \\boxed{5}", "'a b' stands there"),
        ("1 1 1 1 1 1 \\boxed{5}", ""),  # numbers may
    ],
)
def test_invalid_answers(text, why):
    found = invalid(text, min_words=6 if text == "\\boxed{5}" else 0, boxed=True)
    assert found.startswith(why) and bool(found) == bool(why)
