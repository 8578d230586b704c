"""recipes/RESULTS.md says what the committed numbers say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import results_tables
from tests.results_tables import (
    BLOCK,
    COMPARED,
    FOLDER,
    RESULTS,
    as_markdown,
    cell,
    measured,
    numbers,
    prose,
    read,
    sections,
    take,
    write,
    written_anew,
)

DOCUMENT = RESULTS.read_text(encoding="utf-8")
FILES = sorted(path.stem for path in FOLDER.glob("*.json"))


def unknown(heading: str, text: str) -> set[float]:
    """Numbers of a section's prose that none of its files has."""
    known = set[float]()
    for name in FILES:
        content = read(name)
        if heading.startswith(content["section"]):
            known |= measured(content)
    for block in COMPARED.finditer(text):
        known |= numbers(block[2])
    return numbers(prose(f"{heading}\n{text}")) - known


def test_tables_are_those_of_the_numbers() -> None:
    assert written_anew(DOCUMENT) == DOCUMENT, "run python -m tests.results_tables"


def test_no_table_is_typed() -> None:
    rest = COMPARED.sub("", BLOCK.sub("", DOCUMENT))
    typed = re.search(r"^\|.*", rest, re.MULTILINE)
    assert not typed, f"put its numbers into benchmarks/results/: {typed and typed[0]}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_belongs_to_one_section_which_shows_all_of_its_tables(name: str) -> None:
    content = read(name)
    assert content.keys() <= {"section", "source", "tables", "quoted"}
    (text,) = (t for heading, t in sections(DOCUMENT) if heading.startswith(content["section"]))
    shown = {block[3] for block in BLOCK.finditer(text) if block[2] == name}
    assert shown == content["tables"].keys()
    for table in content["tables"].values():
        assert table["command"] and (table.get("source") or content.get("source"))
        assert {len(row) for row in table["rows"]} == {len(table["head"])}


@pytest.mark.parametrize(
    ("heading", "text"), [*sections(DOCUMENT)], ids=[h[:30] for h, _ in sections(DOCUMENT)]
)
def test_numbers_of_the_prose_are_committed(heading: str, text: str) -> None:
    assert not unknown(heading, text), "put them into `quoted` of the section's file"


def test_a_wrong_number_is_seen() -> None:
    heading, text = next(part for part in sections(DOCUMENT) if part[0].startswith("AutoFlow"))
    assert unknown(heading, f"{text}\nWith four passes it came to .3141.") == {0.3141}
    changed = DOCUMENT.replace("| .61 to .91 |", "| .61 to .92 |")
    assert changed != DOCUMENT and written_anew(changed) == DOCUMENT


def test_values_are_shown_in_one_way() -> None:
    assert [cell(each) for each in (0.385, 1.0, 0.0, 12_345, None, "a")] == [
        *(".385", "1.000", ".000", "12,345", "", "a")
    ]
    assert cell([0.52, 0.451, 0.589]) == "+.520 (+.451 .. +.589)"
    assert cell([-0.02, -1.0, 0.0]) == "-.020 (-1.000 .. +.000)"


def test_rows_are_taken_from_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_tables, "FOLDER", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    evaluated = {
        "before": {"accuracy": 0.385},
        "after": {"accuracy": 0.905},
        "paired": {"difference": 0.52, "ci95": [0.45123, 0.58877]},
    }
    summary = {
        "eval": evaluated,
        "budget": {"spent": {"tokens": 48_887}},
        "seconds": {"total": 59.7},
    }
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (run / "config.yaml").write_text("seed: 3\n", encoding="utf-8")
    take("new.seeds", [f"GRPO={run}"], "GRPO", "marlora train grpo_team --seed 3")
    take("new.more", [str(run)], "", "the same")
    assert as_markdown(read("new")["tables"]["seeds"]).splitlines()[2] == (
        "| GRPO | 3 | .385 | .905 | +.520 (+.451 .. +.589) | 48,887 | 60 |"
    )
    assert read("new")["tables"]["more"]["rows"][0][0] == "run"
    assert {0.385, 0.4512, 48_887.0} <= measured(read("new"))
    with pytest.raises(SystemExit, match="--section"):
        take("other.seeds", [str(run)], "", "")


def test_a_row_is_a_line_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_tables, "FOLDER", tmp_path)
    content = {"head": ["a", "b"], "rows": [["x, [y]", [0.1, 0.2, 0.3]], ['q"]', 2]], "empty": []}
    write("file", content)
    assert read("file") == content
    assert ' ["x, [y]", [0.1, 0.2, 0.3]],' in (tmp_path / "file.json").read_text(encoding="utf-8")
