"""The books of a run: what was to be played, what is stored, what was counted. Nothing is lost and
nothing stands there twice."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode


def stored(folder: Path) -> dict[str, Episode]:
    """Episodes of a store by id, each exactly once, without the time they took."""
    found = list(Store(folder))
    twice = [name for name, count in Counter(e.id for e in found).items() if count > 1]
    assert twice == [], f"stored twice: {twice}"
    return {
        e.id: dataclasses.replace(
            e, usage={a: dataclasses.replace(u, seconds=0.0) for a, u in e.usage.items()}
        )
        for e in found
    }


def balance(folder: Path, expected: Iterable[str]) -> dict[str, Episode]:
    """The store's episodes, which must be exactly the expected ones, each once, and none made twice
    of the same draw."""
    found, wanted = stored(folder), set(expected)
    assert found.keys() == wanted, (
        f"lost: {sorted(wanted - found.keys())}; not asked for: {sorted(found.keys() - wanted)}"
    )
    seeds = Counter(e.seed for e in found.values())
    assert max(seeds.values(), default=1) == 1, "two episodes of one seed"
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def balance_run(folder: Path, steps: int, episodes: int) -> None:
    """The books of a training run that ended: steps, episodes, tokens and learnt turns agree in
    every place where they stand."""
    metrics, summary = (
        rows(folder / "metrics.jsonl"),
        json.loads((folder / "summary.json").read_text()),
    )
    assert [row["step"] for row in metrics] == list(range(1, steps + 1)) and summary[
        "steps"
    ] == steps
    played = {
        name: e for name, e in stored(folder / "episodes").items() if e.group.startswith("train-")
    }
    for row in metrics:
        mine = [e for e in played.values() if e.step == row["step"]]
        assert len(mine) == row["episodes"] == episodes, (
            f"step {row['step']}: {len(mine)} stored, {row['episodes']} counted"
        )
        assert (
            sum(u.sampled_tokens for e in mine for u in e.usage.values()) == row["sampled_tokens"]
        )
    assert len(played) == steps * episodes, "an episode of no step"
    assert summary["tokens"]["sampled"] == sum(row["sampled_tokens"] for row in metrics)
    assert summary["tokens"]["trained"] == sum(
        p["tokens"] for row in metrics for p in row["policies"].values()
    )
    learnt = Counter(
        (r["step"], r["policy"], r["episode"], r["turn"], r["ids"])
        for r in rows(folder / "learned.jsonl")
    )
    assert learnt and max(learnt.values()) == 1, "a turn was learnt twice in a step"
    assert all(played[name].step == step for step, _, name, _, _ in learnt), (
        "a turn was learnt in another step than it was played for"
    )
