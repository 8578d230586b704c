"""Gates: not worse, strictly better, always, and in two stages with an early stop."""

from __future__ import annotations

import pytest

from marlora.trainers.values.acceptance import (
    GATES,
    always,
    better_or_perfect,
    mean_over,
    not_worse,
    strictly_better,
    two_stage,
)
from marlora.trainers.values.search import Candidate, Search

TASKS = [f"t{i}" for i in range(10)]


def candidate(id, *scores, fault=""):
    return Candidate({"p": id}, id=id, fault=fault, scores=dict(zip(TASKS, scores, strict=False)))


@pytest.mark.parametrize(
    ("new", "old", "passed"),
    [
        ((1, 0), (0, 0), (True, True, True)),
        ((1, 0), (0, 1), (True, False, True)),
        ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (True, False, True)),
        ((0, 0), (1, 0), (False, False, True)),
    ],
)
def test_gates(new, old, passed):
    new, old = candidate("new", *new), candidate("old", *old)
    assert (
        bool(not_worse(new, old)),
        bool(strictly_better(new, old)),
        bool(always(new, old)),
    ) == passed
    assert {
        "not_worse": not_worse,
        "strictly_better": strictly_better,
        "better_or_perfect": better_or_perfect,
        "always": always,
    } == GATES


@pytest.mark.parametrize(
    ("old", "new", "passed"),
    [((1, 1), (1, 1), True), ((1, 0), (0, 1), False), ((1, 0, 0), (1, 1, 0), True)],
)
def test_an_equal_score_passes_where_it_is_perfect(old, new, passed):
    """Fact U2 of LLM-AutoDiff, gate 1: (1, 1) passes, (.5, .5) does not, a better one does."""
    old, new = candidate("old", *old), candidate("new", *new)
    assert bool(better_or_perfect(new, old)) == passed


def test_a_verdict_gives_the_numbers():
    new, old = candidate("new", 1, 0, 1), candidate("old", 0, 0, 1)
    assert str(strictly_better(new, old)) == "better: 0.6667 against 0.3333 on 3 tasks"
    assert str(strictly_better(old, new)) == "not better: 0.3333 against 0.6667 on 3 tasks"
    assert str(not_worse(new, old, ["t1", "t2"])) == "not worse: 0.5000 against 0.5000 on 2 tasks"
    assert str(always(new, old)) == "always accepted"


def test_only_common_tasks_are_compared():
    new, old = candidate("new", 0, 1), candidate("old", 0, 1, 1, 1)
    assert not strictly_better(new, old) and not_worse(new, old)
    with pytest.raises(
        ValueError, match="candidate new has no score on 1 of 3 tasks, such as 't2'"
    ):
        not_worse(new, old, TASKS[:3])
    with pytest.raises(ValueError, match="new and old were scored on no common task"):
        not_worse(candidate("new", 0), candidate("old"))


@pytest.mark.parametrize("gate", GATES.values())
def test_a_lost_candidate_passes_no_gate(gate):
    with pytest.raises(ValueError, match="candidate new is lost: it raises"):
        gate(candidate("new", 1, fault="it raises"), candidate("old", 0))


class Team:
    """Scores by candidate and task, counted as they are measured; stops as soon as the mean over
    the tasks cannot reach the bound (scores are at most 1)."""

    def __init__(self, *rows):
        self.search, self.asked = Search("search", 0), []
        for number in range(len(rows)):
            self.search.add(Candidate({"p": number}))
        self.rows = rows

    def __call__(self, candidate, tasks, bound):
        found = {}
        for task in tasks:
            left = len(tasks) - len(found)
            if bound is not None and (sum(found.values()) + left) / len(tasks) < bound:
                break
            found[task] = self.rows[int(candidate.id)][TASKS.index(task)]
        self.asked.append((candidate.id, len(found), bound))
        return found

    def gate(self, **fields):
        return two_stage(self.search, "1", "0", self, TASKS[:4], TASKS, **fields)


OLD = (1, 0, 0, 0, 1, 0, 0, 0, 0, 0)


def test_a_candidate_that_is_better_twice_passes_and_every_score_is_kept():
    team = Team(OLD, (1, 1, 0, 0, 1, 0, 0, 0, 0, 0))
    verdict = team.gate()
    assert verdict and str(verdict) == "full set: not worse: 0.3000 against 0.2000 on 10 tasks"
    assert team.asked == [("0", 4, None), ("1", 4, 0.25), ("0", 10, None), ("1", 10, 0.2)]
    assert len(team.search["1"].scores) == 10
    team.asked.clear()
    assert team.gate() == verdict and team.asked == []  # what is scored is not measured again


def test_the_full_set_is_spared_for_one_that_the_minibatch_refuses():
    team = Team(OLD, (0, 1, 0, 0, 1, 1, 1, 1, 1, 1))
    verdict = team.gate()
    assert not verdict
    assert str(verdict) == "minibatch: not better: 0.2500 against 0.2500 on 4 tasks"
    assert team.asked == [("0", 4, None), ("1", 4, 0.25)]


def test_measuring_stops_once_the_bound_cannot_be_reached():
    """The old one has .75 on the minibatch; after two misses the new one cannot have more than
    .5."""
    team = Team((1, 1, 1, 0, 0, 0, 0, 0, 0, 0), (0, 0, 1, 1, 1, 1, 1, 1, 1, 1))
    verdict = team.gate()
    assert not verdict
    assert str(verdict) == (
        "minibatch: only 2 of 4 tasks have a score (stopped early, or not to be scored);"
        " 0.7500 cannot be reached"
    )
    assert team.search["1"].scores == {"t0": 0, "t1": 0}


def test_the_full_set_can_refuse():
    team = Team((1, 0, 0, 0, 1, 1, 1, 1, 1, 1), (1, 1, 0, 0, 0, 0, 0, 0, 0, 0))
    verdict = team.gate()
    assert not verdict and str(verdict).startswith("full set: only ")
    team = Team(OLD, (1, 1, 0, 0, 0, 0, 0, 0, 0, 0))
    refused = team.gate(second=strictly_better)
    assert not refused
    assert str(refused) == "full set: not better: 0.2000 against 0.2000 on 10 tasks"


def test_other_gates_may_stand_at_each_stage():
    team = Team(OLD, (0,) * 10)
    assert team.gate(first=always, second=always)
    assert [bound for _, _, bound in team.asked] == [None] * 4


def test_a_stage_needs_tasks_and_scores_only_of_them():
    team = Team(OLD, OLD)
    with pytest.raises(ValueError, match="the minibatch has no tasks"):
        two_stage(team.search, "1", "0", team, [], TASKS)
    with pytest.raises(
        ValueError, match=r"candidate 0: scores of tasks that were not asked: \['t9'\]"
    ):
        two_stage(team.search, "1", "0", lambda *_: {"t9": 1.0}, TASKS[:2], TASKS)
    assert mean_over(candidate("a", 0.5, 1.0), TASKS[:2]) == 0.75
