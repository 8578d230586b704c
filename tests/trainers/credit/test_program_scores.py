"""ScoreFlow's numbers: scores of runs, chances of pairs, Score-DPO's losses and gradients, and four
programs learnt exactly."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
import torch

from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.program_scores import (
    ScoredProgram,
    best_programs,
    distances,
    drawn,
    ordered_pairs,
    preference,
    score_table,
)
from marlora.trainers.credit.weights import RewardWeights
from marlora.trainers.update.preference_loss import (
    MarginConfig,
    MarginGradient,
    RunLogRatio,
    margin_gradient,
)


def program(
    name: str, scores: list[float], fault: str = "", task: str = "t", **changes: object
) -> list[Episode]:
    """The episodes of a program: one that wrote it, and a child for each further run."""
    valid = Reward("valid", float(not fault), fault, "designer", 0, source="workflow")
    turns = (Turn(0, "designer", text=f"program {name}"), Turn(1, "executor", text="7"))
    given = [
        Episode(name, "g", Task(task, "?"), turns=turns, rewards=(Reward("f1", scores[0]), valid))
    ]
    for k, score in enumerate(scores[1:], 1):
        given.append(
            Episode(
                f"{name}/runs/all/{k}",
                f"{name}/runs/all",
                Task(task, "?"),
                parent=name,
                rewards=(Reward("f1", score),),
            )
        )
    return [dataclasses.replace(given[0], **changes), *given[1:]]  # type: ignore[arg-type]


def table_of(*programs: list[Episode], num_runs: int = 3) -> list[ScoredProgram]:
    return score_table(
        [e for p in programs for e in p], "designer", num_runs, RewardWeights(), "runs"
    )[0]


FOUR = [
    program("a", [1, 1, 1]),
    program("b", [1, 1, 0]),
    program("c", [0, 1, 0]),
    program("d", [0, 0, 0]),
]


def chances(table: list[ScoredProgram], alpha: float) -> dict[tuple[str, str], float]:
    pairs = ordered_pairs(table, False)
    d = distances(pairs, alpha)
    return {
        (one.episode.id, other.episode.id): each / sum(d)
        for (one, other), each in zip(pairs, d, strict=True)
    }


def test_scores_are_means_and_pairs_are_drawn_by_the_cube_of_their_difference() -> None:
    table = table_of(*FOUR)
    assert [row.score for row in table] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert sum(distances(ordered_pairs(table, False), 3.0)) == pytest.approx(1.703704, abs=1e-6)
    assert chances(table, 3.0) == {
        ("a", "d"): pytest.approx(0.586957, abs=1e-6),
        ("a", "c"): pytest.approx(0.173913, abs=1e-6),
        ("b", "d"): pytest.approx(0.173913, abs=1e-6),
        ("a", "b"): pytest.approx(0.021739, abs=1e-6),
        ("b", "c"): pytest.approx(0.021739, abs=1e-6),
        ("c", "d"): pytest.approx(0.021739, abs=1e-6),
    }


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(3.0, [0.75, 0.222222, 0.027778]), (1.0, [0.5, 0.333333, 0.166667]), (0.0, [1 / 3] * 3)],
)
def test_three_pairs_of_three_tasks_are_one_pool(alpha: float, expected: list[float]) -> None:
    scores = [(1.0, 0.0), (1.0, 1 / 3), (2 / 3, 1 / 3)]
    table = table_of(
        *(
            program(f"{n}{k}", [s], task=str(n))
            for n, two in enumerate(scores)
            for k, s in enumerate(two)
        ),
        num_runs=1,
    )
    assert list(chances(table, alpha).values()) == pytest.approx(expected, abs=1e-6)
    pairs = ordered_pairs(table, False)
    counts = Counter(one.episode.id for one, _ in drawn(pairs, 2000, alpha, seed=0))
    for (one, _), share in zip(pairs, expected, strict=True):
        assert abs(counts[one.episode.id] - 2000 * share) < 4 * math.sqrt(
            2000 * share * (1 - share)
        )
    assert [p[0].episode.id for p in drawn(pairs, 5, alpha, 1)] == [
        p[0].episode.id for p in drawn(pairs, 5, alpha, 1)
    ]


def test_a_run_that_is_missing_or_failed_is_worth_nothing() -> None:
    assert table_of(program("a", [1, 1]))[0].score == pytest.approx(0.666667, abs=1e-6)
    failed = program("b", [1, 1, 1])
    failed[2] = dataclasses.replace(failed[2], error="limit", rewards=())
    assert table_of(failed)[0].score == pytest.approx(2 / 3)


def test_what_has_no_score_has_no_row_and_is_counted() -> None:
    unscored, failed = program("a", [1, math.nan, 1]), program("b", [1], error="boom", rewards=())
    rows, without = score_table(
        [*unscored, *failed, *program("c", [1])], "designer", 1, RewardWeights(), "runs"
    )
    assert [row.episode.id for row in rows] == ["c"] and without == {
        "no score": 1,
        "failed episode": 1,
    }


def test_an_invalid_program_scores_nothing_whatever_its_fallback_did() -> None:
    table = table_of(program("a", [1.0], fault="syntax: no"), program("b", [1.0]), num_runs=1)
    assert [(row.score, row.fault) for row in table] == [(0.0, "syntax: no"), (1.0, "")]
    assert ordered_pairs(table, invalid=False) == []
    assert [
        (one.episode.id, other.episode.id) for one, other in ordered_pairs(table, invalid=True)
    ] == [("b", "a")]
    assert [row.episode.id for row in best_programs(table)] == ["b"]


def test_no_difference_gives_no_pair_and_one_text_is_no_pair() -> None:
    assert (
        drawn(
            ordered_pairs(table_of(program("a", [1.0]), program("b", [1.0]), num_runs=1), False),
            10,
            3.0,
            0,
        )
        == []
    )
    twice = [program("a", [1.0]), program("b", [0.0])]
    twice[1][0] = dataclasses.replace(twice[1][0], turns=twice[0][0].turns)
    assert ordered_pairs(table_of(*twice, num_runs=1), False) == []


def test_scores_outside_0_to_1_and_episodes_that_hide_their_validity_are_refused() -> None:
    with pytest.raises(SettingError, match=r"scores 3; scores of programs are from 0 to 1"):
        table_of(program("a", [3.0]), num_runs=1)
    with pytest.raises(SettingError, match="add the reward `workflow`"):
        table_of(program("a", [1.0], rewards=(Reward("f1", 1.0),)))


def test_the_scorer_that_trains_is_named_by_its_weight() -> None:
    given = program("a", [0.5])
    given[0] = dataclasses.replace(given[0], rewards=(*given[0].rewards, Reward("judge", 1.0)))
    row = score_table(given, "designer", 1, RewardWeights({"f1": 1.0}), "runs")[0][0]
    assert row.score == 0.5 and row.episode.reward("judge") == 1.0


# Score-DPO


def score_dpo(
    s_w: float, s_l: float, weighting: str = "both", logps: tuple[float, ...] = (-40, -50, -60, -55)
) -> MarginGradient[str]:
    high, low = table_of(program("w", [1.0]), program("l", [0.5]), num_runs=1)
    pair = preference(
        dataclasses.replace(high, score=s_w), dataclasses.replace(low, score=s_l), weighting
    )
    votes = {
        "w": RunLogRatio("w", "designer", "designer", logps[0], logps[1]),
        "l": RunLogRatio("l", "designer", "designer", logps[2], logps[3]),
    }
    return margin_gradient([pair], votes, MarginConfig(beta=0.1))


def test_score_power_bends_the_weights() -> None:
    """Scores 1/2 and 1/4 squared: f = 1/4 for the chosen program, 1 - 1/16 for the other."""
    high, low = table_of(program("w", [1.0]), program("l", [0.5]), num_runs=1)
    pair = preference(
        dataclasses.replace(high, score=0.5), dataclasses.replace(low, score=0.25), "both", 2.0
    )
    assert pair.factors == (0.25, 0.9375)


@pytest.mark.parametrize(
    ("s_w", "s_l", "weighting", "loss"),
    [
        (1, 1 / 3, "none", 0.201413),
        (1, 0, "both", 0.201413),
        (1, 1 / 3, "both", 0.233963),
        (2 / 3, 1 / 3, "both", 0.313262),
    ],
)
def test_the_loss_of_a_pair(s_w: float, s_l: float, weighting: str, loss: float) -> None:
    assert score_dpo(s_w, s_l, weighting).loss == pytest.approx(loss, abs=1e-6)


def test_the_gradient_of_a_pair() -> None:
    assert score_dpo(1, 1 / 3).weights == {
        "w": pytest.approx(0.020861, abs=1e-6),
        "l": pytest.approx(-0.013907, abs=1e-6),
    }
    assert score_dpo(2 / 3, 1 / 3).weights == {
        "w": pytest.approx(0.017929, abs=1e-6),
        "l": pytest.approx(-0.017929, abs=1e-6),
    }
    # one side alone: r(w) = 1, r(l) = -.5; margins (2/3) 1 + .5 and 1 + (2/3) .5
    assert score_dpo(2 / 3, 1 / 3, "chosen").loss == pytest.approx(
        math.log1p(math.exp(-(2 / 3 + 0.5))), abs=1e-9
    )
    assert score_dpo(2 / 3, 1 / 3, "rejected").loss == pytest.approx(
        math.log1p(math.exp(-(1 + 2 / 3 * 0.5))), abs=1e-9
    )


def test_at_the_start_the_loss_is_ln_2_and_the_gradient_is_smaller_than_dpos() -> None:
    start = (-40.0, -40.0, -60.0, -60.0)
    found = score_dpo(2 / 3, 1 / 3, logps=start)
    assert found.loss == pytest.approx(0.693147, abs=1e-6)
    assert found.weights == {
        "w": pytest.approx(0.033333, abs=1e-6),
        "l": pytest.approx(-0.033333, abs=1e-6),
    }
    assert score_dpo(2 / 3, 1 / 3, "none", start).weights["w"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("alpha", "weighting", "expected", "mean"),
    [
        (3.0, "both", [0.9905, 0.0084, 0.0011, 0.0000], 0.9965),
        (3.0, "none", [0.9859, 0.0133, 0.0008, 0.0000], 0.9950),
        (0.0, "both", None, 0.9789),
        (0.0, "none", None, 0.9795),
    ],
)
def test_four_programs_learnt_exactly(
    alpha: float, weighting: str, expected: list[float] | None, mean: float
) -> None:
    """A categorical policy over four programs, uniform at first: 200 full-batch steps at rate 1 on
    pairs with their exact chances. The sheet's numbers: of alpha 3 the shares and the mean score,
    of alpha 0 the mean score."""
    table = table_of(*FOUR)
    pool = ordered_pairs(table, False)
    d = distances(pool, alpha)
    pairs = [
        dataclasses.replace(preference(*pair, weighting), weight=each / sum(d) * len(pool))
        for pair, each in zip(pool, d, strict=True)
    ]
    theta, reference = torch.zeros(4, dtype=torch.float64, requires_grad=True), math.log(1 / 4)
    for _ in range(200):
        logp = theta.log_softmax(0)
        now = dict(zip("abcd", logp.tolist(), strict=True))
        votes = {
            name: RunLogRatio(name, "designer", "designer", value, reference)
            for name, value in now.items()
        }
        pushed = margin_gradient(pairs, votes, MarginConfig(beta=0.1))
        (gradient,) = torch.autograd.grad(
            sum(pushed.weights[name] * logp[k] for k, name in enumerate("abcd")), theta
        )
        with torch.no_grad():
            theta += gradient
    share = theta.softmax(0).tolist()
    if expected is not None:
        assert share == pytest.approx(expected, abs=1e-4)
    score = sum(p * row.score for p, row in zip(share, table, strict=True))
    assert score == pytest.approx(mean, abs=1e-4)
