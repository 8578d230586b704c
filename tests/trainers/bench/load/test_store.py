"""`marlora bench store` at the size of a test: what it fills is a store as any other."""

from __future__ import annotations

import json
from pathlib import Path

from marlora.rollouts.episodes.store import Store
from marlora.trainers.bench.load import store
from marlora.trainers.bench.measure import Options

PARTS = {
    "open",
    "append",
    "resume: a step's episodes",
    "evaluations",
    "report: rows",
    "report: texts",
}


def test_every_part_at_every_size_and_the_json_after_each(tmp_path: Path) -> None:
    file = tmp_path / "store.json"
    found = store.store(Options(repeats=1, size="tiny", device="cpu", json=str(file)))
    assert {size: set(parts) for size, parts in found["results"].items()} == {
        "200": PARTS,
        "400": PARTS,
    }
    assert json.loads(file.read_text(encoding="utf-8"))["results"] == found["results"]
    assert len(found["rows"]) == 2 * len(PARTS)


def test_what_is_filled_reads_back(tmp_path: Path) -> None:
    store.fill(tmp_path, 120)
    episodes = list(Store(tmp_path))
    assert [e.id for e in episodes] == [f"step-{k // 100}/{k % 100}" for k in range(120)]
    assert all(e.group == e.id.partition("/")[0] for e in episodes)
    assert sum(e.kind == "eval" for e in episodes) == 3
    assert episodes[1].turns == store.sample("x/0", 1).turns
