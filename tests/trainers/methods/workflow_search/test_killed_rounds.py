"""Searches that are killed in the middle of a round: they go on and come to the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.workflow_search.adas import ADASConfig, ADASTrainer
from marlora.trainers.methods.workflow_search.debflow import HELPERS, DebFlowConfig, DebFlowTrainer
from tests.trainers.search_program import debating, inventing
from tests.trainers.searches import larger_ensemble, search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def inventing_anew(role: str, prompt: str) -> str:
    """`inventing`, with a number of votes that no program of the archive has yet."""
    known = prompt.count('"name": "vote"')
    return inventing(role, prompt).replace("range(5)", f"range({5 + known})")


METHODS: dict[str, Callable[..., Any]] = {
    "aflow": functools.partial(search, propose=larger_ensemble),
    "adas": functools.partial(
        search,
        propose=inventing_anew,
        cls=ADASTrainer,
        config=ADASConfig,
        seeds=["chain of thought"],
        max_steps=2,
    ),
    "debflow": functools.partial(
        search,
        propose=debating,
        cls=DebFlowTrainer,
        config=DebFlowConfig,
        helpers=HELPERS,
        max_steps=2,
    ),
}
# after so many talks and parts of measurements; a generation of adas is two talks, a repair the
# second, and its archive begins with two programs
CUTS = [("aflow", 5), ("aflow", 8), ("adas", 5), ("adas", 6), ("adas", 7), ("debflow", 3)]


class Cut(BaseException):
    """Stands for a kill."""


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in [r for by_agent in summary["ledger"].values() for r in by_agent.values()]:
        del row["seconds"]
    path = folder / "checkpoints" / f"step-{summary['steps']:06d}" / "trainer" / "state.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    stored = sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes"))
    keys = ("eval", "ledger", "budget", "done", "state", "steps", "programs")
    return {**{key: summary[key] for key in keys}, "parts": parts, "stored": stored}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Any]:
    """What a method comes to without a kill, run once."""

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name) / "whole"
        METHODS[name](folder, model).train()
        return facts(folder)

    return run


@pytest.mark.parametrize(("name", "at"), CUTS)
def test_a_round_that_is_killed_comes_to_the_same(
    name: str,
    at: int,
    whole: Callable[[str], Any],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After any talk and any part of a measurement."""
    folder, calls = tmp_path / "cut", list[int]()
    killed = METHODS[name](folder, model)

    def cutting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            answer = function(*args, **settings)
            calls.append(at)
            if len(calls) == at:
                raise Cut
            return answer

        return call

    for each in ("play", "ask"):
        own = getattr(killed.run.rollouts, each)
        monkeypatch.setattr(killed.run.rollouts, each, cutting(own))
    with pytest.raises(Cut):
        killed.train()
    METHODS[name](folder, model, resume=True).train()
    assert facts(folder) == whole(name)
