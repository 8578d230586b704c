"""Killed at single file-system calls, before one or half way through a write, and resumed: the
record is the undisturbed run's, and no file or folder is left that it does not have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import ledger
from tests.chaos.file_calls import names
from tests.trainers.small_run import FILE_CALL, runner

pytestmark = pytest.mark.process

CLOCKS = ("seconds", "tokens_per_s", "residual", "max_residual", "proof", "live_proof")
SCOREFLOW = {"made_by": "tests.trainers.scoreflow_run:words_put"}


@pytest.fixture(scope="module")
def play() -> Iterator[Callable[..., int]]:
    with runner() as ask:
        yield ask


def timeless(value: Any) -> Any:
    """A JSON value without what two equal runs may differ in: clocks and measurements."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in CLOCKS}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def record(folder: Path) -> dict[str, Any]:
    """What a run has counted and stored: its metrics, summary (tokens, ledger, hashes) and
    episodes."""
    return {
        "metrics": [timeless(row) for row in ledger.rows(folder / "metrics.jsonl")],
        "summary": timeless(json.loads((folder / "summary.json").read_text(encoding="utf-8"))),
        "episodes": ledger.stored(folder / "episodes"),
    }


def whole(play: Callable[..., int], model: Path, folder: Path, order: dict[str, Any]) -> int:
    """Play a run undisturbed; how many calls it makes."""
    assert play(folder, model, fault=FILE_CALL, **order) == 0, said(folder)
    return int(Path(f"{folder}.calls").read_text(encoding="utf-8"))


def said(folder: Path) -> str:
    return Path(f"{folder}.log").read_text(encoding="utf-8")


def assert_same(folder: Path, expected: Path, where: str) -> None:
    mine, theirs = record(folder), record(expected)
    for part in theirs:
        assert mine[part] == theirs[part], f"{where}: {part}"
    left = names(folder) - names(expected)
    assert not left, f"{where}: left behind: {sorted(left)}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_calls_all_over_a_run(
    play: Callable[..., int], model: Path, tmp_path: Path
) -> None:
    order = {"max_steps": 2}
    calls = whole(play, model, tmp_path / "whole", order)
    for number in range(12):
        at, half = 1 + number * calls // 12, number % 2 == 1
        run = tmp_path / f"run-{number}"
        where = f"killed {'in' if half else 'before'} call {at} of {calls}"
        assert play(run, model, fault=FILE_CALL, at=at, half=half, **order) < 0, where
        assert play(run, model, resume=True, **order) == 0, f"{where}: {said(run)}"
        assert_same(run, tmp_path / "whole", where)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scoreflow_killed_twice_counts_what_it_would_have(
    play: Callable[..., int], model: Path, tmp_path: Path
) -> None:
    """Each run is killed among its programs, or their further runs, and again after the resume."""
    calls = whole(play, model, tmp_path / "whole", SCOREFLOW)
    for number in range(4):
        run, first, second = tmp_path / f"run-{number}", (number + 1) * calls // 5, 20 + 9 * number
        where = f"killed in call {first} of {calls}, and in call {second} of the resumed run"
        order = {**SCOREFLOW, "fault": FILE_CALL}
        assert play(run, model, at=first, half=number % 2 == 0, **order) < 0, where
        assert play(run, model, at=second, resume=True, **order) < 0, where
        assert play(run, model, resume=True, **SCOREFLOW) == 0, f"{where}: {said(run)}"
        assert_same(run, tmp_path / "whole", where)
