"""What the documents say of comparisons is what was measured, and by the plans that stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlora.recipes.compare.comparison import check_same
from marlora.recipes.compare.plan import read_plan
from tests.compare_tables import BLOCK, FOLDER, RESULTS, numbers, written_anew

PLANS = sorted(FOLDER.glob("*.yaml"))
NUMBERS = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_plan_is_one(path: Path) -> None:
    plan = read_plan(path)
    assert plan.name == path.stem and plan.folder.name == f"compare_{path.stem}"


@pytest.mark.parametrize("path", NUMBERS, ids=lambda path: path.stem)
def test_numbers_are_of_the_plan_beside_them(path: Path) -> None:
    plan, result = read_plan(path.with_suffix(".yaml")), numbers(path)
    check_same(result["identity"], plan.identity(), path.name)
    assert result["plan"] == path.stem
    assert result["identity"]["arms"].keys() == plan.arms.keys()
    measured = {row["name"] for row in result["rows"] if row["kind"] != "reference"}
    failed = {name.rpartition(", seed ")[0] for name in result["failed"]}
    assert measured | failed == plan.arms.keys()


def test_tables_of_the_results_are_those_of_the_numbers() -> None:
    document = RESULTS.read_text(encoding="utf-8")
    assert {block[2] for block in BLOCK.finditer(document)} == {path.stem for path in NUMBERS}
    assert written_anew(document) == document, "python -m tests.compare_tables writes them"
