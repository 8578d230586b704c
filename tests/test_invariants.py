"""tests/README.md names, for each invariant of the project, the tests that keep it; those tests
exist."""

from __future__ import annotations

import re

import pytest

from tests.repository import ROOT, names_of_tests

NUMBERS = [*range(1, 66)]
OPEN = "open"


def rows() -> dict[int, list[str]]:
    """Number of each invariant -> what stands in its column of tests."""
    found = re.findall(
        r"^\| (\d+) \|[^|]+\|([^|]+)\|$", (ROOT / "tests/README.md").read_text(), re.MULTILINE
    )
    return {int(number): cell.replace("`", "").replace(",", " ").split() for number, cell in found}


def test_the_table_is_complete() -> None:
    assert sorted(rows()) == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_named_tests_exist(number: int) -> None:
    named = rows()[number]
    assert named, f"invariant {number} names no test"
    for name in named:
        assert name == OPEN or f"tests/{name}" in names_of_tests(), (
            f"invariant {number}: there is no test tests/{name}"
        )


@pytest.mark.slow
def test_no_invariant_is_open() -> None:
    assert [number for number, named in rows().items() if OPEN in named] == []
