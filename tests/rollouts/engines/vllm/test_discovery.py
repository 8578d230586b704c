"""Servers found by files, and the process that starts them on a node. Servers without a model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from marlora.agents.types import PolicySpec, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.vllm import discovery, server
from marlora.rollouts.engines.vllm.discovery import (
    Endpoint,
    read_endpoints,
    serve_endpoints,
    wait_for_endpoints,
    write_endpoints,
)
from marlora.rollouts.engines.vllm.engine import VLLMEngine, start_vllm
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from marlora.rollouts.engines.vllm.server_args import ServerSettings
from tests.rollouts.engines.vllm.test_engine import BASE, DRAW, KEY, adapter
from tests.rollouts.engines.vllm.test_server import fake_program, model
from tests.rollouts.fake_vllm import FakeVLLM, Tokens

__all__ = ["model"]  # a fixture


def key_file(folder: Path) -> str:
    path = folder / "server.key"
    path.write_text(KEY)
    path.chmod(0o600)
    return str(path)


def test_a_folder_of_files_is_as_good_as_one_file(tmp_path: Path) -> None:
    assert read_endpoints(tmp_path / "none", "m") == []
    one, two, other = (
        Endpoint("http://a:1", "k"),
        Endpoint("http://b:1", "k", "m", "float32"),
        Endpoint("http://c:1", "", "else"),
    )
    write_endpoints(tmp_path / "all/a.json", [one])
    write_endpoints(tmp_path / "all/b.json", [two, other])
    assert read_endpoints(tmp_path / "all", "m") == [one, two] and read_endpoints(
        tmp_path / "all/b.json", "m"
    ) == [two]
    assert [path.name for path in (tmp_path / "all").iterdir() if path.suffix != ".json"] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "expected"),
        ("[]", "expected"),
        (
            '{"servers": [{"uri": "http://a"}]}',
            r"servers\[0\].uri: unknown field; did you mean 'url'",
        ),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "servers.json").write_text(text)
    with pytest.raises(SettingError, match=f"servers.json.*{problem}"):
        read_endpoints(tmp_path, "m")


def test_trainers_wait_until_enough_servers_are_there_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "POLL", 0.01)
    lines: list[str] = []

    async def later() -> list[Endpoint]:
        waiting = asyncio.create_task(wait_for_endpoints(tmp_path, "m", 2, 30, lines.append))
        for name in ("a", "b"):
            await asyncio.sleep(0.05)
            write_endpoints(tmp_path / f"{name}.json", [Endpoint(f"http://{name}:1")])
        return await waiting

    assert [endpoint.url for endpoint in asyncio.run(later())] == ["http://a:1", "http://b:1"]
    assert [line.split(" in ")[0] for line in lines] == [
        "waiting for servers: 0 of 2",
        "waiting for servers: 1 of 2",
    ]
    with pytest.raises(EngineError, match="2 of 3 servers of m"):
        asyncio.run(wait_for_endpoints(tmp_path, "m", 3, 0.05, lines.append))


def test_an_engine_on_endpoints_publishes_to_all_of_them(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "versions", "solver-v1-aa")
    with FakeVLLM(key=KEY) as one, FakeVLLM(key=KEY) as two:
        write_endpoints(
            tmp_path / "servers.json",
            [Endpoint(fake.url, key_file(tmp_path), dtype="float32") for fake in (one, two)],
        )
        config = EngineConfig(endpoints=str(tmp_path / "servers.json"), num_servers=2)
        assert choose_engine(config)[0] == "vllm"

        async def work() -> None:
            engine = await start_vllm(
                "m",
                Tokens(),
                [PolicySpec("solver")],
                config,
                folder=tmp_path,
                say=lambda line: None,
            )
            assert engine.info().dtype == "float32" and len(engine.info().replicas) == 2
            await engine.publish({"solver": folder})
            await engine.generate([2, 3], ModelRef("solver", "solver-v1-aa"), DRAW)
            await engine.close()

        asyncio.run(work())
        assert one.loaded == two.loaded == {"solver-v1-aa": str(folder)}


def test_two_ways_to_name_servers_are_one_too_many() -> None:
    with pytest.raises(SettingError, match="server_urls and endpoints: choose one"):
        choose_engine(EngineConfig(server_urls=["http://a/v1"], endpoints="folder"))


def test_a_node_starts_a_dead_server_again_where_trainers_find_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a new key, which the engine reads anew."""
    monkeypatch.setattr(discovery, "POLL", 0.05)
    monkeypatch.setattr(server, "vllm_version", lambda: ("0.0", True))
    monkeypatch.setattr(
        server,
        "command",
        lambda s, port, cpu: fake_program(port, Path(s.folder) / f"{s.label}-0.key"),
    )
    monkeypatch.setattr("marlora.rollouts.engines.vllm.server.check_engine_args", lambda args: None)
    path, ended = tmp_path / "node.json", threading.Event()

    class End(Exception):
        pass

    def pause(seconds: float) -> None:
        if ended.wait(0.05):
            raise End

    monkeypatch.setattr(discovery, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
    failures: list[BaseException] = []

    def node() -> None:
        try:
            serve_endpoints(
                [ServerSettings(str(model), tmp_path, label=name) for name in ("a", "b")],
                path,
                lambda line: None,
            )
        except End as error:
            failures.append(error)

    thread = threading.Thread(target=node)
    thread.start()
    try:
        endpoints = asyncio.run(wait_for_endpoints(path, str(model), 2, 60, lambda line: None))
        quick = ReplicaPolicy(retries=2, backoff=0.05, stall=1.0, probe=1.0)
        engine = VLLMEngine(endpoints, Tokens(), adapter_root=tmp_path, retry=quick)

        async def work() -> None:
            await engine.generate([2, 3], BASE, DRAW)
            old = text_of(endpoints[1].key_file)
            os.kill(pid_at(endpoints[1].url), signal.SIGKILL)
            end = time.monotonic() + 60
            while text_of(endpoints[1].key_file) in ("", old) or len(engine.info().replicas) < 2:
                assert time.monotonic() < end
                await asyncio.gather(*(engine.generate([2, k], BASE, DRAW) for k in range(8)))
                await asyncio.sleep(0.1)
            await engine.score([2, 3], BASE, endpoints[1].url)
            await engine.close()

        asyncio.run(work())
        told = json.loads(path.read_text())["servers"][1]
        assert told["url"] == Path(told["key_file"]).with_suffix(".url").read_text()
    finally:
        ended.set()
        thread.join(60)
    assert len(failures) == 1 and not path.exists() and not list(tmp_path.glob("*.key"))


def text_of(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def pid_at(url: str) -> int:
    """The process that listens at this address."""
    import psutil

    port = int(url.rsplit(":", 1)[1])
    return next(
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == "LISTEN" and c.laddr.port == port and c.pid
    )
