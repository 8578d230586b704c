"""Two hundred steps, or rounds of requests, leave a process with what it had: descriptors, threads,
tensors, memory."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from tests.repository import ROOT, clean_environment
from tests.rollouts.engines.vllm.test_engine import BASE, DRAW, KEY, adapter, engine_on
from tests.rollouts.fake_vllm import FakeVLLM

STEPS, WARM = 200, 5  # of every tenth step, told; after so many of these caches are filled
MIB = 2**20


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1500)
def test_two_hundred_steps(model: Path, tmp_path: Path) -> None:
    env = clean_environment(
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(ROOT),
        TOKENIZERS_PARALLELISM="false",
        MALLOC_ARENA_MAX="1",
    )
    command = [
        sys.executable,
        "-m",
        "tests.chaos.leak_program",
        str(tmp_path / "run"),
        str(model),
        str(STEPS),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "run.held.json").read_text())
    assert len(found) == STEPS // 10
    # What leaks is there in every look at the end; a file that a thread has open just now is not.
    # A pool begins a thread when more calls than before meet by chance.
    for what, more in (("descriptors", 0), ("threads", 2), ("children", 0), ("tensors", 0)):
        before = max(row[what] for row in found[:WARM])
        assert min(row[what] for row in found[-WARM:]) <= before + more, what
    grown = max(row["memory"] for row in found[-3:]) - max(
        row["memory"] for row in found[WARM : WARM + 3]
    )
    assert grown < 16 * MIB, f"{grown / MIB:.1f} MiB in {STEPS - 10 * WARM} steps"
    folders = [path.name for path in (tmp_path / "run/versions").iterdir()]
    assert len(folders) <= 2 * (3 + 1), (
        "per policy: the one in force, and three retired ones, twins of proofs among them"
    )


def test_two_hundred_publishes_and_eight_hundred_requests(tmp_path: Path) -> None:
    """With a failure now and then. Of the client only: the server here lives in a thread of the
    same process and holds what it was sent."""
    with FakeVLLM(key=KEY, faults=["reset" if n % 50 == 0 else "" for n in range(800)]) as fake:

        async def work(engine: VLLMEngine) -> list[tuple[int, int, int]]:
            held, before = [], None
            for number in range(200):
                version = f"solver-v{number}-aa"
                await engine.publish({"solver": adapter(tmp_path, version)})
                await asyncio.gather(
                    *(engine.generate([2, k], ModelRef("solver", version), DRAW) for k in range(3)),
                    engine.score([2, 3], BASE),
                )
                if before is not None:
                    await engine.retire(ModelRef("solver", before))
                before = version
                fake.requests.clear()
                held.append(
                    (
                        len(os.listdir("/proc/self/fd")),
                        threading.active_count(),
                        len(asyncio.all_tasks()),
                    )
                )
            (replica,) = engine.replicas.values()
            assert (
                len(engine._versions.folders) == len(replica.adapters) == len(fake.loaded) == 1
                and +replica.open == {}
            )
            await engine.close()
            return held

        held = asyncio.run(work(engine_on(fake, root=tmp_path)))
    for what, name in enumerate(("descriptors", "threads", "tasks")):
        assert min(row[what] for row in held[-20:]) <= max(row[what] for row in held[:100]), name
