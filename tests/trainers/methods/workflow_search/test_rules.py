"""The rules of AFlow's sheet in numbers, and how replies are read."""

from __future__ import annotations

import random

import pytest

from marlora.agents.types import Task
from marlora.rollouts.types import Episode
from marlora.trainers.methods.workflow_search.convergence import converged, most_varied
from marlora.trainers.methods.workflow_search.experience import (
    experience,
    failures,
    same_edit,
    succeeded,
)
from marlora.trainers.methods.workflow_search.proposals import field_of, read_edit, split_prompts
from marlora.trainers.values.search import Candidate
from marlora.trainers.values.selection import soft_mixed_probabilities, start_and_best
from tests.trainers.searches import reply_with


def test_chances_of_parents_are_the_sheets() -> None:
    """U1 to U3: scores in percent."""
    scores = [60, 55, 50, 40]
    code = [0.535063, 0.244248, 0.137263, 0.083426]
    paper = [0.743249, 0.143821, 0.062697, 0.050233]
    assert soft_mixed_probabilities(scores, 0.3, 0.2) == pytest.approx(code, abs=1e-6)
    assert soft_mixed_probabilities(scores, 0.2, 0.4) == pytest.approx(paper, abs=1e-6)
    flat = soft_mixed_probabilities([0.6, 0.55, 0.5, 0.4], 0.3, 0.2)
    assert flat == pytest.approx([0.253070, 0.251298, 0.249544, 0.246088], abs=1e-6)
    logged = soft_mixed_probabilities([69.759842, 12.431425], 0.3, 0.2)
    assert logged == pytest.approx([0.849993, 0.150007], abs=1e-6)


def test_a_parent_is_drawn_among_the_first_and_the_best_others() -> None:
    """U5."""
    means = {1: 0.4, 2: 0.6, 3: 0.55, 4: 0.5, 5: 0.3}
    pool = tuple(Candidate({}, id=str(n), scores={"t": mean}) for n, mean in means.items())
    assert [c.id for c in start_and_best(pool, 4)] == ["2", "3", "4", "1"]
    assert [c.id for c in start_and_best(pool, 2)] == ["2", "1"]


def test_convergence_is_five_rounds_without_a_change_of_the_best_three() -> None:
    """U4."""
    means = [0.5, 0.6, 0.7] + 5 * [0.4]
    assert converged(means) == (3, 7) and converged(means[:7]) is None
    assert converged([n / 100 for n in range(30)]) is None
    assert converged([0.1, 0.3, 0.2] + 2 * [0.0], rounds=2) == (3, 4)


def test_an_edit_that_gains_nothing_is_no_success() -> None:
    """U6."""
    assert not succeeded(0.6, 0.6) and succeeded(0.6, 0.61)


def test_experience_lists_all_that_was_tried_with_what_came_of_it() -> None:
    parent = Candidate({}, scores={"t": 0.5})
    children = [
        Candidate({}, note="vote", scores={"t": 0.75}),
        Candidate({}, note="think", scores={"t": 0.5}),
        Candidate({}, note="kept", verdict="lost the debate"),
        Candidate({}, note="loop", fault="time: over"),
    ]
    text = experience(parent, children)
    assert text.splitlines()[:4] == [
        "Score of this program: 50.0 %",
        "- Prohibited, tried already: vote (success: 75.0 %)",
        "- Prohibited, tried already: think (failure: 50.0 %)",
        "- Prohibited, tried already: loop (could not be used: time: over)",
    ]
    assert experience(parent, []) == "Score of this program: 50.0 %"


def test_the_tasks_that_vary_most_are_picked() -> None:
    scores = {"a": [1, 1], "b": [0, 1], "c": [0, 0], "d": [0.4, 0.6], "e": [1, 0]}
    assert most_varied(scores, 2) == ["b", "e"] and most_varied(scores, 3) == ["b", "d", "e"]


def test_failures_are_drawn_and_hold_question_answers_and_how_it_ended() -> None:
    tasks = [Task(name, f"what {name}", name.upper()) for name in "abc"]
    played = [Episode(t.id, "g", t.public(), output="x") for t in tasks]
    scores = {"a": 1.0, "b": 0.0, "c": 0.5}
    text = failures(tasks, played, scores, 3, random.Random(0))
    assert "what a" not in text and "Right answer: B" in text and "Right answer: C" in text
    assert len(failures(tasks, played, scores, 1, random.Random(0)).split("Question")) == 2


def test_a_reply_needs_its_three_fields() -> None:
    good = read_edit(reply_with("vote\n twice", "await custom(WAY)", 'WAY = "x"'))
    assert (good.note, good.program, good.fault) == (
        "vote twice",
        'WAY = "x"\n\nawait custom(WAY)',
        "",
    )
    assert read_edit(reply_with("vote", "```python\n1\n```")).program == "1"
    wrapped = read_edit(f"<answer>{reply_with('vote', 'await custom(1)')}</answer>")
    assert wrapped.program == "await custom(1)", "tags around all of it hide nothing"
    lost = read_edit("<modification>vote</modification><graph>1</graph>")
    assert lost.fault == "missing: <prompt>" and not lost.program
    assert read_edit("I would vote.").fault == "missing: <modification>"
    assert read_edit(reply_with(" ", "1")).fault == "missing: <modification>"
    assert field_of("<a>1</a> or <a>2</a>", "a") == "2" and field_of("<a>1", "a") is None


def test_same_words_are_the_same_edit() -> None:
    assert same_edit("Add a  vote", "add a vote") and not same_edit("add a vote", "add two votes")


def test_prompts_are_split_from_the_calls() -> None:
    program = 'A = "x"\nB = """y\nz"""\n\nn = 3\nawait custom(A)'
    assert split_prompts(program) == ('A = "x"\nB = """y\nz"""', "n = 3\nawait custom(A)")
    assert split_prompts("await custom('x')") == ("", "await custom('x')")
