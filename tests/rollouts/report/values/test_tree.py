"""The tree of an archive: where its candidates stand, and what its dots say."""

from __future__ import annotations

import re

from marlora.rollouts.report.values.archive import ArchivedCandidate
from marlora.rollouts.report.values.tree import places_of, tree


def candidate(id: str, *parents: str, **more: object) -> ArchivedCandidate:
    return ArchivedCandidate(id, {}, parents, **more)  # type: ignore[arg-type]


def test_places_by_hand() -> None:
    """0 - 1 - 3
            \\ 4
      \\ 2
    5 (a second root; 6 has both as parents)"""
    each = [
        candidate("0"),
        candidate("1", "0"),
        candidate("2", "0"),
        candidate("3", "1"),
        candidate("4", "1"),
        candidate("5"),
        candidate("6", "5", "0"),
        candidate("7", "gone"),
    ]
    assert places_of({c.id: c for c in each}) == {
        "3": (2, 0),
        "4": (2, 1),
        "1": (1, 0.5),
        "2": (1, 2),
        "0": (0, 1.25),
        "6": (1, 3),
        "5": (0, 3),
        "7": (0, 4),
    }


def test_a_chain_of_any_length_is_one_row() -> None:
    chain = {str(n): candidate(str(n), *([str(n - 1)] if n else [])) for n in range(3000)}
    places = places_of(chain)
    assert places["2999"] == (2999, 0) and places["0"] == (0, 0)


def test_dots_lead_to_their_entries_and_say_who_and_why() -> None:
    each = [
        candidate("0", scores={"a": 0.5, "b": 1.0}, adopted=1),
        candidate("1", "0", proposer="<i>", note="<b>why</b>", fault="no reply"),
        candidate("2", "1", "0"),
    ]
    made = tree({c.id: c for c in each}, lambda c: f"x-{c.id}")
    assert re.findall(r'<a href="(#x-\d)" class="(\w+)">', made) == [
        ("#x-0", "adopted"),
        ("#x-1", "lost"),
        ("#x-2", "kept"),
    ]
    assert "0: 0.750 on 2 tasks" in made and ">0.750</text>" in made
    assert "1: no reply · by &lt;i&gt; · &lt;b&gt;why&lt;/b&gt;" in made and "<b>" not in made
    assert made.count("<path") == 3 and made.count("stroke-dasharray") == 1
    assert "style=" not in made
