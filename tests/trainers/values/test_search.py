"""The archive of a search: candidates, scores, faults, adoptions; it resumes between any two calls;
random search, hill climbing, AFlow's rounds and LLMSelector's votes are three functions each."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from marlora.agents.types import SettingError
from marlora.trainers.values.acceptance import strictly_better, two_stage
from marlora.trainers.values.search import Candidate, Duplicate, Search
from marlora.trainers.values.selection import best, current, pareto, soft_mixed, whole_archive

TASKS = [f"t{i}" for i in range(8)]


def search(seed=0):
    return Search("search", seed)


def scored(by_task, **fields):
    """A search with a candidate per row of scores."""
    found = search()
    for number, scores in enumerate(by_task):
        found.score(found.add(Candidate({"p": number}, **fields)).id, scores)
    return found


def test_a_candidate_keeps_what_it_came_with_and_gets_an_id():
    found = search()
    root = found.add(Candidate({"a.prompt": "Think."}, proposer="start"))
    child = found.add(
        Candidate({"a.prompt": "Think hard."}, "writer", "more effort", parents=("0",), round=3)
    )
    assert (root.id, child.id, found[child.id]) == ("0", "1", child)
    assert (child.proposer, child.note, child.parents, child.round) == (
        "writer",
        "more effort",
        ("0",),
        3,
    )
    assert found.candidates == (root, child) and found.children("0") == (child,)
    assert found.find({"a.prompt": "Think."}) == root and found.find({"a.prompt": "No."}) is None
    assert found.values() == {}


def test_values_are_copied():
    found, demos = search(), ["one"]
    candidate = found.add(Candidate({"a.demos": demos}))
    demos.append("two")
    assert candidate.values == {"a.demos": ["one"]}


def test_a_duplicate_is_refused_by_content():
    found = search()
    found.add(Candidate({"a": "x", "b": [1, 2]}))
    with pytest.raises(Duplicate, match="candidate 0 has the same values"):
        found.add(Candidate({"b": [1, 2], "a": "x"}, "another", "with another reason"))
    assert len(found.candidates) == 1 and found.duplicates == 1


def test_a_lost_candidate_stays_with_its_reason_and_is_not_proposed_again():
    found = search()
    found.score(found.add(Candidate({"p": 0})).id, {"t": 0.5})
    lost = found.lose(found.add(Candidate({"program": "boom("})).id, "does not parse")
    assert lost.fault == "does not parse" and lost.values == {"program": "boom("}
    assert found.pool() == (found["0"],) and found.candidates[1] == lost
    with pytest.raises(Duplicate, match="same values, lost: does not parse"):
        found.add(Candidate({"program": "boom("}))
    with pytest.raises(ValueError, match="candidate 1 is lost: does not parse"):
        found.score("1", {"t": 1.0})
    with pytest.raises(ValueError, match="candidate 1 is lost"):
        found.adopt("1")
    with pytest.raises(ValueError, match="expected the reason why candidate 0 is lost"):
        found.lose("0", "")
    found.adopt("0")
    with pytest.raises(ValueError, match="candidate 0 was adopted and cannot be lost"):
        found.lose("0", "late")


def test_replies_without_values_are_each_on_record():
    found = search()
    for _ in range(2):
        found.add(Candidate({}, "writer", fault="no <graph> in the reply"))
    assert len(found.candidates) == 2
    root = found.add(Candidate({}))  # nothing to change yet is a setting like any other
    assert root.id == "2" and found.find({}) == root
    with pytest.raises(Duplicate):
        found.add(Candidate({}))


def test_scores_add_up_and_the_first_of_equal_ones_is_best():
    found = scored([{"t0": 0.0, "t1": 1.0}, {"t0": 1.0, "t1": 0.0}, {"t0": 0.25, "t1": 0.5}])
    assert [c.mean for c in found.candidates] == [0.5, 0.5, 0.375]
    assert found.best().id == "0"
    assert found.best(["t0"]).id == "1"
    assert found.score("2", {"t1": 1.0, "t2": 0.25}).scores == {"t0": 0.25, "t1": 1.0, "t2": 0.25}
    assert found["2"].mean == 0.5


def test_candidates_of_different_tasks_are_not_compared():
    found = scored([{"t0": 0.9}, {"t0": 0.5, "t1": 0.5}, {"t0": 0.6, "t1": 0.2}])
    with pytest.raises(ValueError, match="candidates 0 and 1 were scored on different tasks"):
        found.best()
    assert found.best(["t0", "t1"]).id == "1" and found.best(["t0"]).id == "0"
    assert [c.scores for c in found.pool(["t1"])] == [{"t1": 0.5}, {"t1": 0.2}]
    with pytest.raises(ValueError, match="no candidate is scored on these tasks yet"):
        found.best(["t9"])
    with pytest.raises(ValueError, match="no tasks to compare candidates on"):
        found.pool([])


def test_the_next_full_evaluation_of_mipro():
    """Minibatch scores {A: [60, 80], B: [75]}: B is next; once B is evaluated in full, A."""
    found = scored([{"m0": 0.6, "m1": 0.8}, {"m1": 0.75}])
    ranked = sorted(found.candidates, key=lambda c: -c.mean)
    assert [c.id for c in ranked] == ["1", "0"] and found["0"].mean == pytest.approx(0.7)


def test_the_current_candidate_is_the_one_adopted_last():
    found = scored([{"t": 0.1}, {"t": 0.2}])
    assert found.current is None
    found.adopt("0", "the start")
    found.adopt("1", "better")
    assert found.current == found["1"] and found["0"].verdict == "the start"
    assert found.reject("1", "not anymore").verdict == "not anymore"
    found.adopt("0", "back again")
    assert found.current.id == "0" and found.current.adopted == 3


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_is_a_number(score):
    found = scored([{"t": 0.5}])
    with pytest.raises(ValueError, match=f"score {score} of candidate 0 on task 'u' is not finite"):
        found.score("0", {"t": 1.0, "u": score})
    assert found["0"].scores == {"t": 0.5}


def test_what_is_not_there_or_not_json_is_refused():
    found = scored([{"t": 0.5}])
    with pytest.raises(KeyError, match="no candidate '7'"):
        found["7"]
    with pytest.raises(KeyError, match="no candidate '7'"):
        found.add(Candidate({"p": 9}, parents=("7",)))
    with pytest.raises(SettingError, match=r"search: values\.p\[0\]: expected JSON .*, got tuple"):
        found.add(Candidate({"p": [(1, 2)]}))
    assert len(found.candidates) == 1
    with pytest.raises(ValueError, match="no scored candidate to select from"):
        search().ask(best, lambda parents, rng: Candidate({}))


# asking


def test_ask_gives_parents_round_and_a_generator_of_its_own():
    found, seen = scored([{"t": 0.1}, {"t": 0.9}]), []

    def propose(parents, rng):
        seen.append((parents, rng.random()))
        return Candidate({"p": len(seen) + 10}, "rule", "why not")

    first = found.ask(best, propose, round=1)
    found.score(first.id, {"t": 0.3})
    second = found.ask(whole_archive, propose, round=2)
    assert (first.parents, first.round, first.proposer) == (("1",), 1, "rule")
    assert (second.parents, second.round) == (("0", "1", "2"), 2)
    assert seen[0][0] == (found["1"],) and seen[0][1] != seen[1][1]


def test_a_duplicate_is_asked_for_anew_and_at_most_so_often():
    found, replies = scored([{"t": 0.1}]), iter([0, 0, 5, 5, 5])

    def propose(parents, rng):
        return Candidate({"p": next(replies)})

    assert found.ask(best, propose, tries=3).values == {"p": 5}
    assert found.ask(best, propose, tries=2) is None
    assert found.duplicates == 4 and len(found.candidates) == 2


def test_a_lost_proposal_comes_back_with_its_fault():
    found = scored([{"t": 0.1}])
    lost = found.ask(best, lambda parents, rng: Candidate({}, "writer", fault="no reply"))
    assert lost.fault == "no reply" and lost.parents == ("0",) and found.candidates[1] == lost


def test_selection_sees_the_named_tasks_and_parents_have_all_scores():
    found = scored([{"a": 0.0, "b": 1.0}, {"a": 0.5, "b": 0.0}])
    (parent,) = found.select(best, ["a"])
    assert parent == found["1"] and parent.scores == {"a": 0.5, "b": 0.0}


def test_the_seed_decides_what_is_drawn():
    def drawn(seed):
        found = search(seed)
        return [found.rng().random() for _ in range(3)]

    assert drawn(0) == drawn(0) and drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 3
    assert Search("another", 0).rng().random() != search(0).rng().random()


# resume


def genome(values):
    """Eight bits; a task is solved if its bit is set."""
    return [values[f"b{i}"] for i in range(len(TASKS))]


def scores_of(candidate, tasks=TASKS):
    solved = dict(zip(TASKS, map(float, genome(candidate.values)), strict=True))
    return {task: solved[task] for task in tasks}


def flip(parents, rng):
    """One bit of a parent flipped; now and then a reply that is lost."""
    values = dict(rng.choice(parents).values)
    key = rng.choice(sorted(values))
    values[key] = 1 - values[key]
    return Candidate(values, "flip", key, fault="unlucky" if rng.random() < 0.1 else "")


def calls(select, rounds):
    """The calls of a search, one after the other: each reads all that it needs from the search."""

    def start(s):
        s.add(Candidate({f"b{i}": 0 for i in range(len(TASKS))}, "start"))

    def newest(s):
        return s.candidates[-1]

    def score(s):
        if not newest(s).fault and not newest(s).scores:
            s.score(newest(s).id, scores_of(newest(s)))

    def ask(step):
        return lambda s: s.ask(select, flip, round=step, tries=3)

    def gate(s):
        if newest(s).fault or newest(s).verdict:
            return
        verdict = strictly_better(newest(s), s.current)
        (s.adopt if verdict else s.reject)(newest(s).id, verdict)

    yield start
    yield score
    yield lambda s: s.adopt("0", "start")
    for step in range(1, rounds + 1):
        yield ask(step)
        yield score
        yield gate


@pytest.mark.parametrize("select", [current, best, whole_archive, pareto, soft_mixed(4)])
def test_it_resumes_between_any_two_calls(select, tmp_path):
    whole, states = search(), []
    plan = list(calls(select, rounds=6))
    for call in plan:
        states.append(json.dumps(whole.state_dict()))
        call(whole)
    assert len(set(states)) > len(plan) / 2 and len(whole.candidates) > 3
    for killed, state in enumerate(states):
        resumed = search()
        resumed.load_state_dict(json.loads(state))
        for call in plan[killed:]:
            call(resumed)
        assert resumed.state_dict() == whole.state_dict(), f"killed before call {killed}"
        assert resumed.candidates == whole.candidates and resumed.sha256() == whole.sha256()
    whole.save(tmp_path)
    loaded = search()
    loaded.load(tmp_path)
    assert loaded.candidates == whole.candidates and loaded.current == whole.current
    with pytest.raises(Duplicate):
        loaded.add(replace(whole["0"]))


def test_a_state_is_a_copy():
    found = scored([{"t": 0.5}])
    state = found.state_dict()
    state["candidates"][0]["scores"]["t"] = 1.0
    state["candidates"][0]["values"]["p"] = 9
    assert found["0"].mean == 0.5 and found["0"].values == {"p": 0}


def test_another_seed_is_refused(tmp_path):
    search(1).save(tmp_path)
    with pytest.raises(SettingError, match="search: the search began with seed 1, got 2"):
        search(2).load(tmp_path)


# methods of three functions


def climb(seed, rounds=60, score=scores_of):
    found = search(seed)
    root = found.add(Candidate({f"b{i}": 0 for i in range(len(TASKS))}, "start"))
    found.score(root.id, score(root))
    found.adopt(root.id)
    for step in range(rounds):
        candidate = found.ask(current, flip, round=step, tries=5)
        if candidate is None or candidate.fault:
            continue
        candidate = found.score(candidate.id, score(candidate))
        if verdict := strictly_better(candidate, found.current):
            found.adopt(candidate.id, verdict)
    return found


def test_hill_climbing_finds_the_best_and_shuffled_scores_do_not():
    assert all(climb(seed).current.mean > 0.8 for seed in range(5))

    def shuffled(candidate):
        own = random.Random(str(genome(candidate.values)))
        return {task: float(own.random() < 0.5) for task in TASKS}

    true_means = [sum(genome(climb(seed, score=shuffled).current.values)) / 8 for seed in range(10)]
    assert sum(true_means) / 10 < 0.6


def test_random_search_evaluates_each_candidate_once_and_the_first_wins_ties():
    """DSPy: seeds -3, -2, -1 and 0 .. C-1 are C + 3 candidates; best first, ties to the earlier."""
    found, made = search(), 0
    for seed in [-3, -2, -1, *range(16)]:
        candidate = found.add(Candidate({"a.demos": [seed]}, f"seed {seed}"))
        found.score(candidate.id, {"t": 0.75 if seed in (-1, 4) else 0.5})
        made += 1
    assert made == len(found.candidates) == 19
    assert found.best().proposer == "seed -1"


def test_votes_of_llmselector_use_scores_by_task():
    """Best sets per query {A,B}, {B}, {A,B,C}, {C}: votes A 2, B 3, C 2."""
    rows = {"A": (1, 0, 1, 0), "B": (1, 1, 1, 0), "C": (0, 0, 1, 1)}
    found = scored([dict(zip(TASKS, map(float, row), strict=False)) for row in rows.values()])
    votes = Counter()
    for task in TASKS[:4]:
        top = max(c.scores[task] for c in found.pool())
        votes.update(c.id for c in found.pool() if c.scores[task] == top)
    assert votes == {"0": 2, "1": 3, "2": 2}
    # an allocation met again is not measured again
    assert found.find({"p": 1}).scores == found["1"].scores


def test_what_was_tried_from_a_parent_with_its_success():
    """AFlow's experience: succeed = after > before; equal is no success, and a lost try is seen."""
    found = scored([{"t": 0.6}])
    for number, score in ((1, 0.6), (2, 0.7), (3, None)):
        child = found.add(Candidate({"p": number}, note=f"edit {number}", parents=("0",)))
        if score is None:
            found.lose(child.id, "raises")
        else:
            found.score(child.id, {"t": score})
    tried = [(c.note, c.fault or c.mean > found["0"].mean) for c in found.children("0")]
    assert tried == [("edit 1", False), ("edit 2", True), ("edit 3", "raises")]


def test_gepa_is_pareto_selection_and_two_stages():
    found, spent = search(), Counter()
    root = found.add(Candidate({f"b{i}": 0 for i in range(len(TASKS))}, "start"))

    def measure(candidate, tasks, bound):
        spent[candidate.id] += len(tasks)
        return scores_of(candidate, tasks)

    minibatch, full = TASKS[:3], TASKS
    found.score(root.id, scores_of(root))
    for step in range(40):
        child = found.ask(pareto, flip, round=step, tries=5, tasks=full)
        if child is None or child.fault:
            continue
        verdict = two_stage(found, child.id, child.parents[0], measure, minibatch, full)
        (found.adopt if verdict else found.reject)(child.id, verdict)
    pool = found.pool(full)
    assert {c.id for c in pool} == {"0"} | {c.id for c in found.candidates if c.adopted}
    assert found.best(full).mean >= 3 / 8  # the three bits that the minibatch sees
    assert all(spent[c.id] == 3 for c in found.candidates if c.verdict.startswith("minibatch"))


def test_every_setting_of_a_small_space_is_found_once():
    """LLMSelector's full search: 3 models in 2 places are 9 allocations."""
    found = search()
    for pair in [*product("ABC", repeat=2), *product("ABC", repeat=2)]:
        if found.find({"x": pair[0], "y": pair[1]}) is None:
            found.add(Candidate({"x": pair[0], "y": pair[1]}))
    assert len(found.candidates) == 9
