"""A run whose rollouts are ahead of it, on a real vLLM server: with and without a router before
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.rollouts.episodes.store import Store
from marlora.rollouts.http import fetch
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.live_server import TARGETS, Live
from tests.rollouts.engines.vllm.test_router import vllm_router
from tests.trainers.small_run import bytes_mod_7

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
torch.set_num_threads(1)


def learn(live: Live, folder: Path, **changes: Any) -> dict[str, Any]:
    """Four steps, one ahead, of two agents; every version proven. Leaves the server as it was."""
    args = GRPOConfig(
        output_dir=str(folder),
        model=str(live.model),
        server_urls=[live.server.url],
        server_key=str(live.server.key_file),
        engine_dtype="float32",
        max_staleness=1,
        max_steps=4,
        tasks_per_step=4,
        num_generations=4,
        num_eval_tasks=4,
        max_concurrency=5,
        max_completion_length=6,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=list(TARGETS),
        **changes,
    )
    made = GRPOTrainer(
        system=tiny_chain(),
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:4],
        rewards=[bytes_mod_7],
        args=args,
    )
    summary = made.train()
    for name in listed(live, folder):
        assert (
            fetch(
                f"{live.server.url}/v1/unload_lora_adapter",
                live.server.key,
                "POST",
                {"lora_name": name},
                60,
            )[0]
            == 200
        )
    return summary


def listed(live: Live, folder: Path) -> list[str]:
    status, body = fetch(f"{live.server.url}/v1/models", live.server.key)
    assert status == 200
    return [
        entry["id"]
        for entry in json.loads(body)["data"]
        if str(entry["root"]).startswith(str(folder))
    ]


def check(folder: Path, summary: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        len(rows) == 4
        and rows[0]["staleness"] == 0
        and all(row["max_staleness"] <= 1 for row in rows)
    )
    assert any(row["staleness"] > 0 for row in rows), "something was played ahead"
    assert not any("dropped_stale" in row for row in rows)
    assert summary["live_proof"]["failed"] == 0 and summary["live_proof"]["passed"] >= 8
    played = list(Store(folder / "episodes").read(kind="train"))
    assert len(played) == len({e.id for e in played}) == 4 * 16
    for e in played:
        assert all(turn.version == e.state.versions.get(turn.policy, "") for turn in e.turns)
        steps = {
            int(version.split("-v")[1].split("-")[0]) for version in e.state.versions.values()
        } or {0}
        assert len(steps) == 1 and 0 <= e.step - 1 - steps.pop() <= 1
    trained = {p["sha256_after"] != p["sha256_before"] for p in summary["policies"].values()}
    assert trained == {True}


def test_a_run_with_rollouts_ahead_on_a_server(server: Live, tmp_path: Path) -> None:
    check(tmp_path / "run", learn(server, tmp_path / "run"))


@pytest.mark.slow
def test_the_same_through_vllm_router(server: Live, tmp_path: Path) -> None:
    with vllm_router(tmp_path / "log", server.server.url) as router:
        check(tmp_path / "run", learn(server, tmp_path / "run", router_url=router))
    routed = (tmp_path / "log").read_text()
    assert "x-session-id:first-" in routed and "x-session-id:last-" in routed
