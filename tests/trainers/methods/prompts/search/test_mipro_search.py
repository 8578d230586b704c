"""The search of MIPRO: sizes, full evaluations and suggestions by the numbers of its method sheet,
and its estimator against random search on the sheet's offline variant."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.methods.prompts.search.mipro_search import (
    SAMPLERS,
    Trial,
    default_trials,
    minibatch,
    next_full,
    num_evaluations,
    program_runs,
    tpe,
    uniform,
)


@pytest.mark.parametrize(
    ("agents", "demos", "candidates", "trials"),
    [(1, True, 6, 10), (1, False, 6, 9), (2, True, 6, 20), (2, True, 12, 28)]
    + [(3, True, 18, 50), (1, False, 18, 27)],
)
def test_trials_follow_from_agents_and_candidates(
    agents: int, demos: bool, candidates: int, trials: int
) -> None:
    """Fact 1."""
    assert default_trials(agents, demos, candidates) == trials


def test_evaluations_and_runs_of_a_search() -> None:
    """Facts 2 and 3: S 5, B 35, 100 tasks. The sheet's formula leaves out the full evaluation after
    the last trial where 5 does not divide the trials: 28 has one more, of 100 runs."""
    assert [num_evaluations(trials, 5) for trials in (10, 20, 28)] == [13, 25, 35]
    assert [program_runs(t, 5, 35, 100) for t in (10, 20, 28)] == [650, 1200, 1580 + 100]
    assert program_runs(10, 5, 0, 40) == 40 * 11, "all validation tasks for every trial"


def test_the_next_full_evaluation_is_of_the_highest_mean() -> None:
    """Fact 4: A 60 and 80, B 75."""
    trials = [Trial({}, "a", 60, False), Trial({}, "b", 75, False), Trial({}, "a", 80, False)]
    assert next_full(trials) == "b"
    trials.append(Trial({}, "b", 50, True))
    assert next_full(trials) == "a", "a full score counts for nothing here"
    assert next_full([*trials, Trial({}, "a", 99, True)]) is None
    tie = [Trial({}, "c", 1, False), Trial({}, "d", 1, False)]
    assert next_full(tie) == "c" and next_full([]) is None


def test_minibatches_are_drawn_anew_for_every_trial() -> None:
    drawn = [minibatch(60, 20, 0, trial) for trial in range(30)]
    assert all(len(set(own)) == 20 and own == sorted(own) for own in drawn)
    assert len({tuple(own) for own in drawn}) == 30 and drawn[3] == minibatch(60, 20, 0, 3)
    assert {task for own in drawn for task in own} == set(range(60))
    assert minibatch(60, 0, 0, 1) == list(range(60)) and minibatch(60, 20, 1, 3) != drawn[3]


SPACE = {"a.prompt": 3, "b.prompt": 3, "a.demos": 4, "b.demos": 4}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_suggestion_follows_from_the_trials_and_the_seed(sampler: str) -> None:
    rng = random.Random(0)
    trials = [
        Trial({name: rng.randrange(n) for name, n in SPACE.items()}, "0", rng.random(), False)
        for _ in range(15)
    ]
    suggest = SAMPLERS[sampler]
    first = suggest(SPACE, trials, 3)
    assert suggest(SPACE, trials, 3) == first and list(first) == list(SPACE)
    assert all(0 <= first[name] < count for name, count in SPACE.items())
    assert len({tuple(suggest(SPACE, trials, seed).values()) for seed in range(10)}) > 1
    assert suggest(SPACE, trials, 2**63 + 1), "seeds of any size"


def test_the_estimator_goes_by_the_scores() -> None:
    """After 40 trials where only option 2 of `x` was good it is suggested nearly always; with
    scores of another option, the other."""

    def share(good: int) -> float:
        space = {"x": 4}
        trials = [Trial({"x": n % 4}, "0", float(n % 4 == good), False) for n in range(40)]
        return sum(tpe(space, trials, seed)["x"] == good for seed in range(20)) / 20

    assert share(2) > 0.8 and share(0) > 0.8
    drawn = [uniform({"x": 4}, [], seed)["x"] for seed in range(400)]
    assert all(abs(drawn.count(option) - 100) < 40 for option in range(4))


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        SettingError, match=r"sampler: tpe needs .* pip install 'marlora\[search\]'"
    ):
        tpe({"x": 2}, [], 0)


# the sheet's offline variant


def value(choice: Mapping[str, int]) -> float:
    """The chance that a task is solved."""
    good = {"a.prompt": (1, 0.15), "b.prompt": (2, 0.15), "a.demos": (2, 0.1), "b.demos": (3, 0.1)}
    return 0.3 + sum(much for name, (option, much) in good.items() if choice[name] == option)


def searched(sampler: str, num_trials: int, seed: int, shuffled: bool = False) -> tuple[float, ...]:
    """(score of the team as it began, of the best fully evaluated candidate, the chance of the
    latter), on 60 tasks with B 20 and S 5; `shuffled`: scores that have nothing to do with the
    choice."""
    tasks = [random.Random(f"{seed} {task}").random() for task in range(60)]

    def solved(choice: Mapping[str, int], task: int) -> float:
        chance = 0.5 if shuffled else value(choice)
        where = f"{sorted(choice.items())} {task}" if shuffled else ""
        return float((random.Random(where).random() if shuffled else tasks[task]) < chance)

    def evaluated(choice: Mapping[str, int], on: list[int], full: bool) -> Trial:
        score = sum(solved(choice, task) for task in on) / len(on)
        return Trial(dict(choice), str(sorted(choice.items())), score, full)

    trials = [evaluated(dict.fromkeys(SPACE, 0), list(range(60)), True)]
    best = start = trials[0]
    for number in range(1, num_trials + 1):
        choice = SAMPLERS[sampler](SPACE, trials, 1000 * seed + number)
        trials.append(evaluated(choice, minibatch(60, 20, seed, number), False))
        id = next_full(trials) if number % 5 == 0 else None
        if id is not None:
            own = next(trial for trial in trials if trial.candidate == id)
            trials.append(evaluated(own.choice, list(range(60)), True))
            best = max(best, trials[-1], key=lambda trial: trial.score)
    return start.score, best.score, value(best.choice)


def means(sampler: str, num_trials: int, seeds: int, shuffled: bool = False) -> list[float]:
    runs = [searched(sampler, num_trials, seed, shuffled) for seed in range(seeds)]
    assert all(best >= start for start, best, _ in runs), "never worse than the team as it began"
    return [sum(column) / seeds for column in zip(*runs, strict=True)]


@pytest.mark.slow
def test_the_estimator_beats_random_search_at_equal_budget_and_needs_true_scores() -> None:
    """Ten seeds, 50 trials; the sheet has .784 for its estimator and .715 for random search.
    With shuffled scores the choice that is kept is worth what a random one is: 0.3 + .15 (1/3 +
    1/3) + .1 (1/4 + 1/4) = .45."""
    start, best, chance = means("tpe", 50, 10)
    _, random_best, random_chance = means("random", 50, 10)
    assert start < 0.35 < 0.65 < random_best < best and random_chance < chance > 0.74
    lost = means("tpe", 25, 12, shuffled=True)[2]
    assert abs(lost - 0.45) < 0.07
