"""Score tables in the report: shares by cluster, queries, and what came of them."""

from __future__ import annotations

from typing import Any

from marlora.rollouts.report.values.heat_map import heat_map
from marlora.rollouts.report.values.score_table import MAX_ROWS, score_table_of, score_table_section

STATE: dict[str, Any] = {
    "systems": ["once", "a <b>vote</b>"],
    "scores": {"q1": [1, 0], "q2": [1, 1], "q3": [0, 1]},
    "clusters": {"q1": "sums", "q2": "sums", "q3": "code"},
    "triples": [
        {
            "query": "q1",
            "cluster": "sums",
            "system": "once",
            "reasoning": "It is a sum.",
            "program": 'await custom("Add.")',
            "base": 1,
            "refined": 0,
            "accepted": False,
            "fault": "",
        }
    ],
}


def test_a_memory_with_scores_is_a_table_and_others_are_not() -> None:
    found = score_table_of(STATE)
    assert found is not None
    assert found.by_cluster == [("code (1)", [0.0, 1.0]), ("sums (2)", [1.0, 0.5])]
    assert [name for name, _ in found.by_query] == ["code: q3", "sums: q1", "sums: q2"]
    for other in (None, [], {}, {"systems": [], "scores": {}}, {**STATE, "scores": {}}):
        assert score_table_of(other) is None


def test_shares_names_and_verdicts_stand_on_the_page() -> None:
    found = score_table_of(STATE)
    assert found is not None
    page = score_table_section(found)
    assert page.count("<figure") == 2 and page.count("<rect") == 2 * 2 + 3 * 2
    assert "<title>2: a &lt;b&gt;vote&lt;/b&gt;, sums (2): 0.500</title>" in page
    assert "<b>" not in page and "style=" not in page
    assert "its rewriting scored 0 and was left" in page and "It is a sum." in page


def test_many_queries_are_counted_and_not_all_drawn() -> None:
    many = {f"q{n:04}": [n % 2, 1] for n in range(500)}
    state = {**STATE, "scores": many, "clusters": dict.fromkeys(many, "c"), "triples": []}
    found = score_table_of(state)
    assert found is not None and len(found.by_query) == MAX_ROWS
    page = score_table_section(found)
    assert f"{500 - MAX_ROWS} more" in page and page.count("<rect") == 2 + 2 * MAX_ROWS


def test_columns_are_numbered_unless_their_ends_are_named() -> None:
    rows = [("row", [0.25, None, 1.0])]
    numbered = heat_map(["a", "b", "c"], "shares", rows)
    assert (
        numbered.count("<rect") == 2 and ">3</text>" in numbered and "1.000</text>" not in numbered
    )
    named = heat_map(["a", "b", "c"], "shares", rows, ("first", "last"))
    assert ">first</text>" in named and ">last</text>" in named and ">1.000</text>" in named
