"""A small fleet: every episode is stored once, whatever goes down, and a loss would be told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from marlora.rollouts.episodes.store import Store
from marlora.rollouts.ledger import Ledger
from marlora.trainers.bench.load import fleet
from marlora.trainers.bench.load.fleet import AGENTS, Fleet, Load
from marlora.trainers.bench.measure import Options
from marlora.trainers.errors import RunError

SMALL = Load(replicas=4, in_flight=40, episodes=200, median=0.01)


def test_a_fleet_loses_and_doubles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fleet.LOADS, "tiny", SMALL)
    found = fleet.fleet(Options(repeats=1, size="tiny", device="cpu"))
    assert found["calls"] == SMALL.episodes * len(AGENTS)
    assert found["outages"] > 0 and found["retried"] > 0  # calls went down with a replica
    assert found["ms_per_call"] > 0 and 0 <= found["late"]["p50"] <= found["late"]["largest"]
    assert found["memory_last_over_first"] < 1.5
    assert json.loads(json.dumps(found)) == found


def played(folder: Path) -> tuple[Store, Fleet, Ledger]:
    """A store of four episodes with three calls each, and what counted them."""
    load = Load(replicas=2, in_flight=2, episodes=8, median=0.0)
    kept: list[tuple[Store, Fleet, Ledger]] = []

    def look(store: Store, load: Load, engine: Fleet, ledger: Ledger) -> None:
        kept.append((Store(store.folder), engine, ledger))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "check", look)
        patch.setattr(fleet, "memory_of", lambda *how: {})
        asyncio.run(fleet.play(load, folder))
    fleet.check(*kept[0][:1], load, *kept[0][1:])
    return kept[0]


@pytest.mark.parametrize(
    ("harm", "problem"),
    [("lost", "1 episodes are lost, 0 stored twice"), ("twice", "0 episodes are lost, 1 stored")],
)
def test_an_episode_lost_or_stored_twice_is_told(tmp_path: Path, harm: str, problem: str) -> None:
    store, engine, ledger = played(tmp_path)
    (file,) = store.files()
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[1:] if harm == "lost" else [*lines, lines[0]]), encoding="utf-8")
    load = Load(replicas=2, in_flight=2, episodes=8, median=0.0)
    with pytest.raises(RunError, match=problem):
        fleet.check(store, load, engine, ledger)


def test_a_call_that_nobody_counted_is_told(tmp_path: Path) -> None:
    store, engine, ledger = played(tmp_path)
    engine.answered += 1
    load = Load(replicas=2, in_flight=2, episodes=8, median=0.0)
    with pytest.raises(RunError, match="24 calls on record, 24 in the ledger, 25 answered"):
        fleet.check(store, load, engine, ledger)


def test_memory_is_looked_at_while_all_are_in_flight() -> None:
    load = Load(1, 10, 100, 1.0)
    samples = [(0.0, 10, 0), *((float(k), 10, 2000 + k) for k in range(8)), (9.0, 3, 10**9)]
    found = fleet.memory_of(samples, 1000, load)
    assert found["bytes_per_episode_in_flight"] == (2000.5 - 1000) / 10
    assert found["memory_last_over_first"] == 2006.5 / 2000.5
    with pytest.raises(RunError, match="before memory could be looked at"):
        fleet.memory_of(samples[-3:], 1000, load)
