"""Archives of candidates as a search's part holds them: what is shown, and where a value is from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from marlora.rollouts.report.values.archive import (
    MAX_CANDIDATES,
    MAX_TRIED,
    ArchivedCandidate,
    archive_of,
    candidate_details,
    origin_of,
    parts_of,
    shown_of,
)
from marlora.trainers.values.search import Candidate, Search
from tests.rollouts.report.learnt_values import PROMPTS, archive, write_run

NAME = "first.prompt"


def test_the_parts_are_those_of_the_newest_checkpoint(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    older = run / "checkpoints" / "step-000002"
    (older / "trainer" / "parts" / "other").mkdir(parents=True)
    (older / "trainer" / "parts" / "other" / "state.json").write_text("{}")
    (older / "system.json").write_text("{}")
    assert sorted(parts_of(run)) == ["edges", "history", "prompts"]
    assert parts_of(tmp_path / "nothing") == {}


def test_a_search_is_read_as_it_was_saved() -> None:
    search = archive("lost one")
    found = archive_of(json.loads(json.dumps(search.state_dict())))
    assert found is not None and list(found) == ["0", "1", "2", "3"]
    for mine, its in zip(found.values(), search.candidates, strict=True):
        for name in ArchivedCandidate.__dataclass_fields__:
            assert getattr(mine, name) == getattr(its, name), name
    assert [c.standing for c in found.values()] == ["adopted", "adopted", "lost", "adopted"]
    assert found["3"].mean == 0.75 and math.isnan(found["2"].mean)


def test_what_is_no_archive_is_none() -> None:
    for state in ({}, {"candidates": []}, {"candidates": {"a": 1}}, {"candidates": [{"id": "0"}]}):
        assert archive_of(state) is None, state


def test_a_value_comes_from_the_candidate_that_was_adopted_last_with_it() -> None:
    search = Search("s", 0)
    for values in ({NAME: "a", "x": "1"}, {NAME: "a", "x": "2"}, {NAME: "b", "x": "2"}):
        search.add(Candidate(values))
    search.adopt("1")
    search.lose("2", "no")
    found = archive_of(search.state_dict())
    assert found is not None
    assert origin_of([found], NAME, "a") is found["1"]
    assert origin_of([found], NAME, "b") is None, "a lost one was never in force"
    assert origin_of([found], "x", "1") is found["0"] and origin_of([], "x", "1") is None


def test_details_say_what_changed_against_the_parent_who_proposed_it_and_why() -> None:
    found = archive_of(archive("<b>lost</b>").state_dict())
    assert found is not None
    made = candidate_details(found["3"], found, "c0-3")
    for expected in (
        '<details id="c0-3" class="candidate adopted">',
        "round 3 · from 1, 0 · optimizer · 0.750 on 4 tasks · adopted as number 3",
        "a check is missing",
        "better: 0.7500 against 0.5000 on 4 tasks",
        "<ins>Check it.\n</ins>Answer with<del> a</del><ins> one</ins> number.",
    ):
        assert expected in made, expected
    made = candidate_details(found["2"], found, "c0-2")
    assert "candidate lost" in made and "<b>lost" not in made and "&lt;b&gt;lost" in made
    assert PROMPTS[0] in candidate_details(found["0"], found, "c0-0"), "the whole of the first one"


def test_details_list_what_was_tried_from_a_candidate_with_what_came_of_it() -> None:
    """Of another parent alone: what has many parents was no edit of one."""
    made = {
        "0": ArchivedCandidate("0", {}, scores={"t": 0.5}),
        "1": ArchivedCandidate("1", {}, ("0",), note="<i>vote</i>", scores={"t": 1.0}),
        "2": ArchivedCandidate("2", {}, ("0",), note="wizard", fault="call: no operator"),
        "3": ArchivedCandidate("3", {}, ("0", "1"), note="both", scores={"t": 1.0}),
    }
    shown = candidate_details(made["0"], made, "c0-0")
    assert "<b>1</b> &lt;i&gt;vote&lt;/i&gt; <small>1.000 on 1 task</small>" in shown
    assert "<b>2</b> wizard <small>lost: call: no operator</small>" in shown
    assert "both" not in shown and "tried from it" not in candidate_details(made["1"], made, "c")
    many = {f"{n}": ArchivedCandidate(f"{n}", {}, ("0",) * (n > 0)) for n in range(30)}
    shown = candidate_details(many["0"], many, "c0-0")
    assert shown.count("<li>") == MAX_TRIED and f"{29 - MAX_TRIED} more" in shown


def test_a_large_archive_shows_the_adopted_and_the_best_with_what_they_came_from() -> None:
    many = {"0": ArchivedCandidate("0", {}, scores={"t": 0.0})}
    for n in range(1, 500):
        mean = 1.0 if n == 450 else -n / 1000
        many[str(n)] = ArchivedCandidate(str(n), {}, (str(n // 2),), scores={"t": mean})
    many["499"] = ArchivedCandidate("499", {}, ("249",), adopted=1)
    shown = shown_of(many)
    assert len(shown) <= MAX_CANDIDATES and list(shown) == sorted(shown, key=int)
    assert {"499", "249", "124", "62", "31", "15", "7", "3", "1", "0", "450", "225"} <= set(shown)
    assert all(c.parents == () or c.parents[0] in shown for c in shown.values())
    assert shown_of({"0": many["0"]}) == {"0": many["0"]}
