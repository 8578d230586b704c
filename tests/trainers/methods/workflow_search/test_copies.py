"""The control of `benchmarks/scripts/copies.py`: copies of the first program."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scripts.copies import CopiesConfig, CopiesTrainer
from tests.trainers.searches import FIRST, random_words, search

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_best_of_copies_is_worth_what_the_first_program_is(model: Path, tmp_path: Path) -> None:
    made = search(
        tmp_path / "run",
        model,
        random_words,
        cls=CopiesTrainer,
        config=CopiesConfig,
        helpers=(),
        max_steps=3,
        greedy_validation=False,
    )
    summary = made.train()
    programs = [each.values["program"] for each in made.search.candidates]
    assert programs == [FIRST, *(f"{FIRST}  # copy {n}" for n in (1, 2, 3))]
    assert all(len(each.scores) == 6 for each in made.search.candidates), "each was measured"
    assert summary["eval"]["paired"]["difference"] == 0 and "aside" not in summary["ledger"]
