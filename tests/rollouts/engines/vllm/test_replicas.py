"""Several servers: what gets lost, who goes on, and with what a lost one comes back. Servers
without a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import PolicySpec
from marlora.rollouts.engines.base import EngineError, ModelRef, ReplicaLost
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.factory import address_of, attach_engine, revive_servers
from marlora.rollouts.engines.vllm import server as vllm_server
from marlora.rollouts.engines.vllm.client import RequestRefused
from marlora.rollouts.engines.vllm.discovery import Endpoint
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from marlora.rollouts.engines.vllm.replicas import CAPS, capped
from marlora.rollouts.engines.vllm.server import VLLMServer
from marlora.rollouts.engines.vllm.server_args import ServerSettings
from tests.rollouts.engines.vllm.test_engine import BASE, DRAW, KEY, QUICK, adapter, engine_on, play
from tests.rollouts.engines.vllm.test_server import fake_program, group_of, model
from tests.rollouts.fake_vllm import FakeVLLM, Tokens, sampled

__all__ = ["model"]  # a fixture


async def until(done: Callable[[], bool], engine: VLLMEngine) -> None:
    """Play on until it holds: lost servers are looked after while there is work."""
    for _ in range(500):
        if done():
            return
        await engine.generate([2, 3], BASE, DRAW)
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to hold")


async def many(engine: VLLMEngine, ref: ModelRef = BASE) -> None:
    replies = await asyncio.gather(*(engine.generate([2, k], ref, DRAW) for k in range(16)))
    name = ref.version or "served-base"
    assert [reply.token_ids for [reply] in replies] == [
        tuple(sampled(name, [2, k], 100, 6)) for k in range(16)
    ]


def test_the_others_answer_for_a_lost_server_which_comes_back_with_the_right_adapters(
    tmp_path: Path,
) -> None:
    folders = {
        name: adapter(tmp_path, name) for name in ("solver-v1-aa", "solver-v2-bb", "critic-v1-cc")
    }
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        port = int(two.url.rsplit(":", 1)[1])

        async def work(engine: VLLMEngine) -> None:
            await engine.publish(
                {"solver": folders["solver-v1-aa"], "critic": folders["critic-v1-cc"]}
            )
            await many(engine)
            assert one.completions() and two.completions()
            two.stop()
            await many(engine, ModelRef("solver", "solver-v1-aa"))
            assert engine.info().replicas == (one.url,) and list(engine.fleet.lost) == [two.url]
            with pytest.raises(ReplicaLost, match="is lost"):
                await engine.score([2, 3], BASE, two.url)
            # While it is away, one version comes and one goes.
            await engine.publish({"solver": folders["solver-v2-bb"]})
            await engine.retire(ModelRef("solver", "solver-v1-aa"))
            with FakeVLLM(key=KEY, port=port) as again:
                again.loaded["solver-v1-aa"] = str(
                    folders["solver-v1-aa"]
                )  # as after a broken network: nobody told it
                again.loaded["critic-v1-cc"] = "/elsewhere"
                await until(lambda: len(engine.info().replicas) == 2, engine)
                expected = {name: str(folders[name]) for name in ("solver-v2-bb", "critic-v1-cc")}
                assert again.loaded == one.loaded == expected == await engine.adapters(two.url)
                before = len(again.completions())
                await many(engine, ModelRef("solver", "solver-v2-bb"))
                assert len(again.completions()) > before

        play(engine_on(one, two, root=tmp_path), work)


def test_another_process_asks_the_same_servers_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that it never published is asked for by name; a server that was lost comes back as
    it is, although this process knows of no adapter; no key is sent in the address."""
    monkeypatch.setattr("marlora.rollouts.engines.vllm.replicas.PAUSES", (0.01, 0.02))
    (tmp_path / "versions").mkdir()
    folder = adapter(tmp_path / "versions", "solver-v1-aa")
    key = tmp_path / "key"
    key.write_text(KEY, encoding="utf-8")
    key.chmod(0o600)
    config = EngineConfig(server_key=str(key))
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        port = int(two.url.rsplit(":", 1)[1])

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": folder})
            address = json.loads(json.dumps(address_of(engine)))
            assert KEY not in str(address)
            other = await asyncio.to_thread(attach_engine, address, Tokens(), config, tmp_path)  # type: ignore[arg-type]
            assert isinstance(other, VLLMEngine)
            ref = ModelRef("solver", "solver-v1-aa")
            await many(other, ref)
            two.stop()
            await many(other, ref)
            assert list(other.fleet.lost) == [two.url]
            with FakeVLLM(key=KEY, port=port) as again:
                again.loaded["solver-v1-aa"] = str(folder)
                await until(lambda: not other.fleet.lost, other)
                assert again.loaded == {"solver-v1-aa": str(folder)}
                await many(other, ref)
            named = [path for path, _, body in one.requests if ref.version in str(body)]
            assert named.count("/v1/load_lora_adapter") == 1
            assert named.count("/v1/unload_lora_adapter") == 0
            await other.close()

        play(engine_on(one, two, root=tmp_path / "versions"), work)


class Told:
    """The files by which another process finds a server that is started again."""

    def __init__(self, folder: Path, fake: FakeVLLM) -> None:
        self.key_file = folder / "vllm-0.key"
        self.tell(fake)
        self.endpoint = Endpoint(fake.url, str(self.key_file))

    def tell(self, fake: FakeVLLM) -> None:
        self.key_file.with_suffix(".url").write_text(fake.url, encoding="utf-8")
        self.key_file.write_text(fake.key, encoding="utf-8")
        self.key_file.chmod(0o600)


@pytest.mark.parametrize("others", [0, 1])
def test_another_process_follows_a_server_to_its_new_address_and_waits_for_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """Whether it is the only one or not. No key is sent to where the server was before."""
    monkeypatch.setattr("marlora.rollouts.engines.vllm.replicas.PAUSES", (0.01, 0.02))
    ref, new = ModelRef("solver", "solver-v1-aa"), "n" * 20
    with FakeVLLM(key=KEY) as first, FakeVLLM(key=KEY) as second:
        port = int(first.url.rsplit(":", 1)[1])
        for fake in (first, second):
            fake.loaded[ref.version] = "/versions/solver-v1-aa"
        told = Told(tmp_path, first)
        (tmp_path / "second").mkdir()
        rest = [Told(tmp_path / "second", second).endpoint][:others]
        engine = VLLMEngine(
            [told.endpoint, *rest], Tokens(), adapter_root=tmp_path, retry=QUICK, foreign=True
        )

        async def work(engine: VLLMEngine) -> None:
            await many(engine, ref)
            first.stop()
            with FakeVLLM(key=KEY, port=port) as stranger, FakeVLLM(key=new) as again:
                stranger.key = "s" * 20
                asking = asyncio.create_task(many(engine, ref))
                while not stranger.requests:
                    await asyncio.sleep(0.01)
                told.tell(again)
                while not again.requests or (not others and not asked_one(again, "/v1/models")):
                    await asyncio.sleep(0.01)
                if not others:  # it answers, but has not got the adapter yet
                    await asyncio.sleep(0.1)
                    assert not asking.done() and engine.fleet.lost
                again.loaded[ref.version] = "/versions/solver-v1-aa"
                await asking
                await until(lambda: not engine.fleet.lost, engine)
                before = len(again.completions())
                await many(engine, ref)
                assert len(again.completions()) > before
                assert f"Bearer {new}" not in {key for _, key, _ in stranger.requests}
                assert not any(path.endswith("_lora_adapter") for path, _, _ in again.requests)

        play(engine, work)


def asked_one(fake: FakeVLLM, route: str) -> bool:
    return any(path == route for path, _, _ in fake.requests)


def test_a_server_that_got_a_new_key_or_lost_its_adapters_unnoticed_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401 and 404 say so to a process that did not start it. Any other refusal is one, as is a 404
    for what its server has."""
    monkeypatch.setattr("marlora.rollouts.engines.vllm.replicas.PAUSES", (0.01, 0.02))
    ref = ModelRef("solver", "solver-v1-aa")
    with FakeVLLM(key=KEY) as fake:
        told = Told(tmp_path, fake)
        policy = replace(QUICK, gone=0.3)
        engine = VLLMEngine(
            [told.endpoint], Tokens(), adapter_root=tmp_path, retry=policy, foreign=True
        )

        async def work(engine: VLLMEngine) -> None:
            fake.loaded[ref.version] = "/versions/solver-v1-aa"
            fake.key = "n" * 20
            told.tell(fake)
            await many(engine, ref)
            for status in ("400", "404"):
                fake.faults.append(status)
                with pytest.raises(RequestRefused, match=f"HTTP {status}: scripted"):
                    await engine.generate([2, 3], ref, DRAW)
            fake.loaded.clear()
            with pytest.raises(EngineError, match=r"gone .*does not list solver-v1-aa again yet"):
                await engine.generate([2, 3], ref, DRAW)
            fake.loaded[ref.version] = "/versions/solver-v1-aa"
            await many(engine, ref)

        play(engine, work)


def test_a_silent_server_is_lost_while_its_health_is_fine() -> None:
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        two.dead = True

        async def work(engine: VLLMEngine) -> None:
            await many(engine)
            assert list(engine.fleet.lost) == [two.url]
            two.dead = False
            await until(lambda: not engine.fleet.lost, engine)

        play(engine_on(one, two), work)


def test_errors_of_one_server_are_answered_by_another() -> None:
    with FakeVLLM(key=KEY, faults=["500"] * 4) as one, FakeVLLM(key=KEY) as two:

        async def work(engine: VLLMEngine) -> Any:
            [reply] = await engine.generate([3, 9, 4], BASE, DRAW)
            return reply.token_ids

        assert play(engine_on(one, two), work) == tuple(sampled("served-base", [3, 9, 4], 100, 6))
        assert len(one.completions()) >= QUICK.retries + 1 and len(two.completions()) == 1


def test_when_all_are_gone_the_error_names_each() -> None:
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        policy = ReplicaPolicy(
            retries=1, backoff=0.01, longest=0.02, stall=0.3, probe=0.2, gone=0.1
        )

        async def work(engine: VLLMEngine) -> None:
            one.stop()
            two.stop()
            with pytest.raises(
                EngineError,
                match=rf"all 2 servers are gone \(.*{one.url}.*{two.url}|{two.url}.*{one.url}",
            ):
                await engine.generate([2, 3], BASE, DRAW)

        play(engine_on(one, two, retry=policy), work)


def test_a_version_cannot_be_published_to_nobody(tmp_path: Path) -> None:
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        policy = ReplicaPolicy(
            retries=1, backoff=0.01, longest=0.02, stall=0.3, probe=0.2, gone=0.1
        )

        async def work(engine: VLLMEngine) -> None:
            one.stop()
            two.stop()
            with pytest.raises(EngineError, match="all 2 servers are gone"):
                await engine.publish({"solver": adapter(tmp_path, "solver-v1-aa")})

        play(engine_on(one, two, root=tmp_path, retry=policy), work)


def ours(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 2, restarts: int = 1
) -> list[VLLMServer]:
    """Servers of ours, of which a program that only pretends plays vLLM; each is started again so
    often."""
    started: list[VLLMServer] = []
    monkeypatch.setattr(vllm_server, "vllm_version", lambda: ("0.0", True))
    for index in range(count):
        settings = ServerSettings(
            str(model),
            folder,
            policies=[PolicySpec("solver")],
            max_restarts=restarts,
            label="vllm",
            devices=("", ""),
        )
        server = VLLMServer(settings, index, progress=lambda line: None)
        monkeypatch.setattr(
            vllm_server,
            "command",
            lambda s, port, cpu, own=server: fake_program(port, own.key_file),
        )
        started.append(server.start())
    return started


def test_one_of_ours_is_started_again_behind_the_others_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = ours(model, tmp_path, monkeypatch)
    engine = VLLMEngine(
        [one, two],
        Tokens(),
        adapter_root=tmp_path / "versions",
        retry=ReplicaPolicy(backoff=0.05, stall=1.0),
    )
    folder = adapter(tmp_path / "versions", "solver-v1-aa")

    async def work(engine: VLLMEngine) -> None:
        await engine.publish({"solver": folder})
        ref = ModelRef("solver", "solver-v1-aa")
        for restart in (1, 2):
            os.kill(group_of(two)[0], signal.SIGKILL)
            await many(engine, ref)
            if (
                restart == 1
            ):  # the last of the servers that was made is the one that `command` starts again
                await until(lambda: len(engine.info().replicas) == 2, engine)
                assert await engine.adapters(two.name) == {"solver-v1-aa": str(folder)}
        await until(lambda: "started again 1 times" in engine.fleet.lost.get(two.name, ""), engine)
        assert engine.info().replicas == (one.name,)

    play(engine, work)
    assert not one.alive and not two.alive


def test_one_of_ours_that_only_another_process_asks_is_started_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That process waits for it, and for its adapters; what died too often is an error."""
    monkeypatch.setattr("marlora.rollouts.engines.vllm.replicas.PAUSES", (0.01, 0.02))
    server, ref = ours(model, tmp_path, monkeypatch, 1)[0], ModelRef("solver", "solver-v1-aa")
    engine = VLLMEngine([server], Tokens(), adapter_root=tmp_path / "versions", retry=QUICK)
    folder = adapter(tmp_path / "versions", "solver-v1-aa")

    async def work(engine: VLLMEngine) -> None:
        await engine.publish({"solver": folder})
        await revive_servers(engine)
        assert engine.replicas[server.name].health.restarts == 0, "it lives"
        other = await asyncio.to_thread(
            attach_engine,
            address_of(engine) or {},
            Tokens(),  # type: ignore[arg-type]
            EngineConfig(),
            tmp_path,
        )
        os.kill(group_of(server)[0], signal.SIGKILL)
        asking = asyncio.create_task(other.generate([2, 3], ref, DRAW))
        await until_dead(server)
        await revive_servers(engine)
        assert [reply.token_ids for reply in await asking] == [
            tuple(sampled(ref.version, [2, 3], 100, 6))
        ]
        os.kill(group_of(server)[0], signal.SIGKILL)
        await until_dead(server)
        with pytest.raises(EngineError, match="started again 1 times"):
            await revive_servers(engine)
        await other.close()

    play(engine, work)


async def until_dead(server: VLLMServer) -> None:
    while server.alive:
        await asyncio.sleep(0.01)


def test_with_other_servers_to_ask_waits_are_short() -> None:
    assert capped(ReplicaPolicy()) == ReplicaPolicy(**CAPS)  # type: ignore[arg-type]
    assert capped(QUICK) == QUICK
    waiting = sum(ReplicaPolicy().backoff * 1.5 * 2**k for k in range(CAPS["retries"] - 1))  # type: ignore[arg-type]
    assert waiting <= 30 and CAPS["stall"] + CAPS["probe"] <= 30


def test_what_an_earlier_process_left_loaded_is_unloaded_and_other_peoples_adapters_stay(
    tmp_path: Path,
) -> None:
    mine, old, foreign = (
        adapter(tmp_path, "solver-v3-cc"),
        str(tmp_path / "solver-v1-aa"),
        "/elsewhere/solver-v1-aa",
    )
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:

        async def work(engine: VLLMEngine) -> None:
            await engine.publish({"solver": mine})
            one.loaded["solver-v1-aa"], two.loaded["theirs"] = old, foreign
            await engine.fleet.forget(tmp_path)
            assert one.loaded == {"solver-v3-cc": str(mine)} and two.loaded == {
                "solver-v3-cc": str(mine),
                "theirs": foreign,
            }

        play(engine_on(one, two, root=tmp_path), work)
