"""A plan of episodes played while its server fails in every way: the books balance, and hold what
an undisturbed server gives."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, Task
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.scripted import ByteTokenizer
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from marlora.rollouts.engines.vllm.server import VLLMServer
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import (
    EpisodeLimits,
    EpisodeRequest,
    EpisodeRunner,
    episode_requests,
)
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.renderer import ChatRenderer
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.testbeds.tiny import tiny_chain
from tests.chaos.ledger import balance
from tests.rollouts.engines.vllm.test_engine import BASE, KEY, engine_on
from tests.rollouts.engines.vllm.test_replicas import ours
from tests.rollouts.engines.vllm.test_server import group_of
from tests.rollouts.engines.vllm.test_server import model as folder_of_config
from tests.rollouts.fake_vllm import FakeVLLM, sampled

__all__ = ["folder_of_config"]  # a fixture

QUICK = ReplicaPolicy(
    retries=3, backoff=0.01, longest=0.02, request=1.0, stall=30.0, probe=0.2, gone=0.1
)
SERVED = {"key": KEY, "context": 4096}


def length(task: Task, episode: Episode) -> float:
    return float(len(str(episode.output)))


def plan() -> list[EpisodeRequest]:
    """Two agents, six tasks, two siblings of each: 24 requests."""
    return episode_requests(tiny_tasks()[:6], label="train-000001", num_generations=2, step=1)


def collect(
    engine: VLLMEngine,
    folder: Path,
    after: Callable[[int], None] = lambda count: None,
    concurrency: int = 4,
) -> None:
    """Play what the store has not yet; `after` is told how many have been stored. Closes the
    engine."""

    async def go() -> None:
        try:
            with Store(folder) as store:
                system = tiny_chain()
                speakers = {
                    a.policy: EngineCompleter(engine, engine.tokens, "base") for a in system.specs
                }  # type: ignore[arg-type]
                rollouts = EpisodeRunner(
                    system,
                    speakers,
                    [length],
                    sampling=Sampling(max_tokens=6),
                    limits=EpisodeLimits(concurrency=concurrency),
                )
                known = store.ids()
                count = len(known)
                async for episode in rollouts.collect(
                    [job for job in plan() if job.id not in known]
                ):
                    assert store.append(episode), f"{episode.id} was played although it was stored"
                    count += 1
                    after(count)
        finally:
            await engine.close()

    asyncio.run(go())


def on(*fakes: FakeVLLM, policy: ReplicaPolicy = QUICK) -> VLLMEngine:
    engine = engine_on(*fakes, retry=policy)
    engine.tokens = ChatRenderer(ByteTokenizer())
    return engine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Episode]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with FakeVLLM(**SERVED) as fake:
        collect(on(fake), folder)
        assert len(fake.completions()) == 24
    return balance(folder, [job.id for job in plan()])


FAULTS = [
    "500",
    "503",
    "429",
    "reset",
    "half",
    "garbage",
    "short",
    "long",
    "twice",
    "again",
    "stall",
    "drip",
    "nan",
    "other prompt",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_now_and_then_changes_nothing(
    fault: str, undisturbed: dict[str, Episode], tmp_path: Path
) -> None:
    """Every seventh request goes wrong. What takes for ever is given up after a second and asked
    for again."""
    with FakeVLLM(**SERVED, faults=[fault if n % 7 == 2 else "" for n in range(100)]) as fake:
        collect(on(fake), tmp_path)
        assert len(fake.completions()) > 24 or fault == "again"
    assert balance(tmp_path, undisturbed) == undisturbed


def test_a_reply_that_comes_again_is_not_the_next_ones() -> None:
    """Two siblings ask the same with other seeds. The first one's reply lies on the connection when
    the second asks."""
    with FakeVLLM(**SERVED, faults=["again", "", ""]) as fake:

        async def go() -> list[Any]:
            engine, made = on(fake), []
            for seed in (1, 2, 3):
                made += await engine.generate([3, 9, 4], BASE, Sampling(max_tokens=6, seed=seed))
                await asyncio.sleep(0.1)
            await engine.close()
            return made

        made = asyncio.run(go())
    assert [one.token_ids for one in made] == [
        tuple(sampled("served-base", [3, 9, 4], seed, 6)) for seed in (1, 2, 3)
    ]


def test_after_a_reply_that_came_again_no_later_one_is_off_by_one() -> None:
    """The copy comes before the second request's own reply, which takes longer: once the copy is
    refused, that reply is still to come on the connection, where the third would take it."""
    with FakeVLLM(**SERVED, faults=["again", "slow", "slow", "", ""]) as fake:

        async def go() -> list[Any]:
            engine, made = on(fake), []
            for seed in (1, 2, 3, 4, 5):
                made += await engine.generate([3, 9, 4], BASE, Sampling(max_tokens=6, seed=seed))
            await engine.close()
            return made

        made = asyncio.run(go())
    assert [one.token_ids for one in made] == [
        tuple(sampled("served-base", [3, 9, 4], seed, 6)) for seed in (1, 2, 3, 4, 5)
    ]


def test_a_busy_server_is_waited_for(undisturbed: dict[str, Episode], tmp_path: Path) -> None:
    """For several times the patience with a silent one: tokens are being generated."""
    policy = ReplicaPolicy(retries=1, backoff=0.01, request=60.0, stall=0.2, probe=0.1)
    with FakeVLLM(**SERVED) as fake:

        def rest(count: int) -> None:
            if count == 3:
                fake.busy = True
                asyncio.get_running_loop().call_later(1.0, setattr, fake, "busy", False)

        collect(on(fake, policy=policy), tmp_path, rest)
        assert len(fake.completions()) == 24
    assert balance(tmp_path, undisturbed) == undisturbed


@pytest.mark.parametrize("how", ["healthy but dead", "gone", "500 for ever"])
def test_a_server_that_stays_away_ends_with_its_name_and_the_rest_is_played_later(
    how: str, undisturbed: dict[str, Episode], tmp_path: Path
) -> None:
    policy = ReplicaPolicy(
        retries=2, backoff=0.01, longest=0.02, request=10.0, stall=0.3, probe=0.2
    )
    with FakeVLLM(**SERVED) as fake:

        def fail(count: int) -> None:
            if count == 5:
                fake.faults.extend(["500"] * 1000 if how.startswith("500") else [])
                fake.dead = how.startswith("healthy")
                if how == "gone":
                    fake.stop()

        with pytest.raises(EngineError, match=fake.url):
            collect(on(fake, policy=policy), tmp_path, fail)
    kept = set(Store(tmp_path).ids())
    assert 5 <= len(kept) < 12
    with FakeVLLM(**SERVED) as fake:
        collect(on(fake), tmp_path)
        assert len(fake.completions()) == 2 * (12 - len(kept)), (
            "what is stored is not asked for again"
        )
    assert balance(tmp_path, undisturbed) == undisturbed


@pytest.mark.process
@pytest.mark.parametrize("when", ["idle", "serving"])
def test_sigkill_of_a_server_of_ours(
    when: str,
    undisturbed: dict[str, Episode],
    folder_of_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two: before the first request, or in the middle of them. The other one goes on, or the
    killed one is started again."""
    made: list[VLLMServer] = ours(folder_of_config, tmp_path, monkeypatch, restarts=2)
    engine = VLLMEngine(
        made,
        ChatRenderer(ByteTokenizer()),
        adapter_root=tmp_path,
        retry=ReplicaPolicy(backoff=0.05, stall=1.0),
    )
    engine.context = 4096  # what pretends to be a server says 64

    def kill(count: int) -> None:
        if count == 4:
            os.kill(group_of(made[1])[0], signal.SIGKILL)

    if when == "idle":
        kill(4)
    collect(engine, tmp_path / "store", kill if when == "serving" else lambda count: None)
    found = balance(tmp_path / "store", undisturbed)
    assert {name: e.output for name, e in found.items()} == {
        name: e.output for name, e in undisturbed.items()
    }
    assert not any(server.alive for server in made)
