"""`learned.jsonl`: advantages and ratios of trained turns by hand, and as a run writes them."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch

from marlora.rollouts.episodes.store import Store
from marlora.trainers.batching.batches import pack
from marlora.trainers.batching.samples import Denominators, TrainingSequence
from marlora.trainers.monitoring.token_log import TokenLog
from marlora.trainers.testbeds.tiny import tiny_random_model
from marlora.trainers.update.losses.inputs import LossInputs
from tests.trainers import small_run


def sample(
    policy: str, episode: str, advantages: tuple[float, ...], logprobs: tuple[float, ...]
) -> TrainingSequence:
    """Two prompt tokens, a turn of two tokens, one token in between, a turn of one."""
    return TrainingSequence(
        policy,
        episode,
        (1, 2, 7, 8, 3, 9),
        (0, 0, 1, 1, 0, 1),
        logprobs,
        advantages,
        (1.0,) * 6,
        (-1, -1, 0, 0, -1, 4),
    )


def test_a_turn_is_put_down_with_its_advantage_and_ratios(tmp_path: Path) -> None:
    samples = [
        sample("p", "e1", (0, 0, 0.5, 0.5, 0, -1), (0, 0, -1.0, -2.0, 0, -3.0)),
        sample("p", "e2", (0, 0, 0.25, 0.75, 0, -1), (0, 0, -1.0, -1.0, 0, -1.0)),
        sample("q", "e1", (0, 0, 1, 1, 0, 1), (0, 0, -1.0, -1.0, 0, -1.0)),
    ]
    learned = TokenLog()
    seen: list[int] = []
    watched, noted = learned.watch(
        samples, lambda inputs: (seen.append(inputs.logp.numel()), (inputs.logp.sum(), {}))[1]
    )
    for batch in pack([s for s in samples if s.policy == "p"], max_tokens=64, layout="padded"):
        logp = batch.behaviour + math.log(2)
        loss, _ = watched(LossInputs.of(batch, logp, torch.zeros(1), Denominators(1, 1)))
    assert sum(seen) == 6 and loss.ndim == 0
    learned.add(samples, noted)
    learned.write(tmp_path / "learned.jsonl", 3)
    learned.write(tmp_path / "learned.jsonl", 4)
    rows = [json.loads(line) for line in (tmp_path / "learned.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {3} and len(rows) == 6
    first = {
        "step": 3,
        "policy": "p",
        "episode": "e1",
        "turn": 0,
        "ids": zlib.crc32(b"[7, 8]"),
        "advantage": 0.5,
        "ratio": [2.0, 2.0],
    }
    assert rows[0] == first
    assert rows[1]["turn"] == 4 and rows[1]["advantage"] == -1 and rows[1]["ratio"] == [2.0]
    assert rows[2]["advantage"] == [0.25, 0.75], "one per token where they differ"
    assert rows[4]["ratio"] == [None, None], "another rank's"


def test_a_run_writes_what_it_trained(tmp_path: Path) -> None:
    trainer = small_run.trainer(
        tmp_path / "run", tiny_random_model(tmp_path / "model"), max_steps=1, num_iterations=2
    )
    trainer.train()
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "learned.jsonl").read_text().splitlines()
    ]
    stored = {e.id: e for e in Store(tmp_path / "run" / "episodes")}
    assert rows
    for row in rows:
        (turn,) = [t for t in stored[row["episode"]].turns if t.index == row["turn"]]
        assert (
            zlib.crc32(json.dumps(list(turn.token_ids)).encode()) == row["ids"]
            and turn.policy == row["policy"]
        )
        assert len(row["ratio"]) == len(turn.token_ids) and row["advantage"]
    assert any(abs(ratio - 1) > 1e-3 for row in rows for ratio in row["ratio"]), (
        "the second pass has moved"
    )
    assert all(ratio > 0 for row in rows for ratio in row["ratio"])
