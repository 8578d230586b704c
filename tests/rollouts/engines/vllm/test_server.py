"""Starting, restarting and ending servers: the command line, and processes that only pretend to be
vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marlora.agents.types import AdapterSpec, PolicySpec, Sampling, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.vllm import server as vllm_server
from marlora.rollouts.engines.vllm import server_args
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.engines.vllm.health import ReplicaPolicy
from marlora.rollouts.engines.vllm.server import VLLMServer, start_servers
from marlora.rollouts.engines.vllm.server_args import (
    ServerSettings,
    check_engine_args,
    command,
    context,
    environment,
    lora_sizes,
    to_flags,
)
from tests.repository import ROOT
from tests.rollouts.engines.vllm.test_engine import adapter
from tests.rollouts.fake_vllm import Tokens, sampled

FAKE = ROOT / "tests/rollouts/fake_vllm.py"
TEAM = [
    PolicySpec("solver", adapter=AdapterSpec(r=4)),
    PolicySpec("critic", adapter=AdapterSpec(r=12)),
    PolicySpec("base"),
]
OUTSIDE = PolicySpec("judge", base="gpt", url="http://elsewhere", adapter=AdapterSpec(r=4096))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"max_position_embeddings": 8192, "dtype": "float32"})
    )
    return folder


# sizes, flags and environment


def test_slots_for_two_policies():
    sizes = lora_sizes([*TEAM, OUTSIDE], staleness=1)
    assert sizes is not None
    assert (sizes.max_rank, sizes.max_loras, sizes.max_cpu_loras) == (
        16,
        5,
        7,
    )  # 2 x (1 + 1) + 1, 2 x (1 + 2) + 1; 12 -> 16
    assert sizes.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert lora_sizes([PolicySpec("base"), OUTSIDE]) is None
    with pytest.raises(SettingError, match=r"policies\.big\.adapter\.r.*512, got 600"):
        lora_sizes([PolicySpec("big", adapter=AdapterSpec(r=600))])


def test_command_line(model: Path, tmp_path: Path):
    flags = command(
        ServerSettings(str(model), tmp_path, policies=TEAM, engine_args={"max_num_seqs": 64}),
        8123,
        on_cpu=True,
    )
    for flag in (
        "--served-model-name=base",
        "--host=127.0.0.1",
        "--port=8123",
        "--middleware=marlora.rollouts.engines.vllm.auth.Guard",
        "--dtype=float32",
        "--max-model-len=4096",
        "--generation-config=vllm",
        "--logprobs-mode=processed_logprobs",
        "--block-size=32",
        "--no-enable-chunked-prefill",
        "--max-num-batched-tokens=4096",
        "--max-lora-rank=16",
        "--max-loras=3",
        "--max-cpu-loras=5",
        "--max-num-seqs=64",
    ):
        assert flag in flags
    at = flags.index("--lora-target-modules")
    assert flags[at + 1 : at + 5] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert "--block-size=32" not in command(ServerSettings(str(model), tmp_path), 1, on_cpu=False)


def test_flags():
    values = {"a": 1, "b": True, "c": False, "d": [1, 2], "e": {"x": 1}}
    assert to_flags(values) == ["--a=1", "--b", "--no-c", "--d", "1", "2", '--e={"x": 1}']


def test_context_is_the_models_own_up_to_a_limit(model: Path, tmp_path: Path):
    assert context(ServerSettings(str(model), tmp_path)) == 4096
    assert context(ServerSettings(str(model), tmp_path, max_model_len=8192)) == 8192
    with pytest.raises(SettingError, match="8192 tokens, got 9000"):
        context(ServerSettings(str(model), tmp_path, max_model_len=9000))
    with pytest.raises(SettingError, match=r"no config\.json"):
        context(ServerSettings(str(tmp_path), tmp_path))


def test_environment_drops_other_keys_and_a_launchers_ranks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in (
        "VLLM_API_KEY",
        "VLLM_SERVER_DEV_MODE",
        "RANK",
        "MASTER_PORT",
        "ACCELERATE_USE_CPU",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "1")
    env = environment(
        ServerSettings(str(model), tmp_path, memory=3.2), tmp_path / "key", on_cpu=True, devices="1"
    )
    assert not {
        "VLLM_API_KEY",
        "VLLM_SERVER_DEV_MODE",
        "RANK",
        "MASTER_PORT",
        "ACCELERATE_USE_CPU",
        "OMP_NUM_THREADS",
    } & set(env)
    assert (env["HF_HUB_OFFLINE"], env["VLLM_CPU_KVCACHE_SPACE"], env["CUDA_VISIBLE_DEVICES"]) == (
        "1",
        "3",
        "1",
    )
    assert env["MARLORA_KEY_FILE"] == str(tmp_path / "key") and env["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    "name", ["host", "api_key", "--api-key", "middleware", "generation_config", "max_lora_rank"]
)
def test_arguments_the_engine_relies_on_cannot_be_overridden(name: str):
    with pytest.raises(SettingError, match=f"engine_args.{name}: marlora sets it"):
        check_engine_args({name: 1})


# processes


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets servers run another program in vLLM's place: `pretend(lambda port, key_file: [program,
    ...])`."""

    def use(program: Callable[[int, Path], list[str]]) -> None:
        def fake_command(settings: ServerSettings, port: int, on_cpu: bool) -> list[str]:
            return program(port, Path(settings.folder) / "vllm-0.key")

        monkeypatch.setattr(vllm_server, "vllm_version", lambda: ("0.0", True))
        monkeypatch.setattr(vllm_server, "command", fake_command)

    yield use


def fake_program(port: int, key_file: Path) -> list[str]:
    return [sys.executable, str(FAKE), str(port), str(key_file)]


def python(code: str) -> Callable[[int, Path], list[str]]:
    return lambda port, key_file: [sys.executable, "-c", code, str(port)]


def quiet(line: str) -> None:
    pass


def group_of(server: VLLMServer) -> list[int]:
    """Processes whose parent is the supervisor."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == server.supervisor_pid:
            pids.append(int(stat.parent.name))
    return pids


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_start_and_stop_leave_no_process_and_no_key(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(fake_program)
    lines: list[str] = []
    server = VLLMServer(ServerSettings(str(model), tmp_path), progress=lines.append).start()
    assert server.key_file.stat().st_mode & 0o777 == 0o600
    assert "ready after" in lines[-1] and str(server.log) in lines[-1]
    [pid] = group_of(server)
    server.stop()
    server.stop()
    assert gone(pid) and not server.alive and not server.key_file.exists()


def modes(server: VLLMServer) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in (server.key_file, server.url_file)]


def test_a_restart_keeps_the_port_unless_somebody_took_it_and_says_where_it_is(
    model: Path, tmp_path: Path, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    """The key is a new one each time. Both files are gone when it is stopped."""
    pretend(fake_program)
    look, free = vllm_server.port_is_free, list[bool]()
    monkeypatch.setattr(vllm_server, "port_is_free", lambda *at: free.append(look(*at)) or free[-1])
    server = VLLMServer(ServerSettings(str(model), tmp_path), progress=quiet).start()
    url, key = server.url, server.key
    assert (server.key_file.read_text(), server.url_file.read_text()) == (key, url)
    assert modes(server) == [0o600, 0o600]
    server.stop()
    assert not server.key_file.exists() and not server.url_file.exists()
    server.start()
    assert (server.url == url) == free.pop(), "another program may have taken it in between"
    assert server.url_file.read_text() == server.url and server.key != key
    server.stop()
    url = server.url
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        listener.listen()
        server.start()
        assert server.url != url and server.url_file.read_text() == server.url
        assert vllm_server.served_base(server.url, server.key)[0] == "served-base"
    server.stop()


def test_a_server_that_dies_at_start_shows_the_end_of_its_log(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(python("import sys; [print(k) for k in range(100)]; sys.exit('out of memory')"))
    with pytest.raises(
        EngineError, match=r"vllm-0 ended while it started(.|\n)*99\nout of memory"
    ) as caught:
        VLLMServer(ServerSettings(str(model), tmp_path), progress=quiet).start()
    assert "\n69\n" not in str(caught.value)  # thirty lines


def test_a_server_that_never_comes_up_is_stopped(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(python("import time; print('loading', flush=True); time.sleep(600)"))
    server = VLLMServer(ServerSettings(str(model), tmp_path, timeout=1.0), progress=quiet)
    server.launch()
    while not (pids := group_of(server)):
        time.sleep(0.01)
    with pytest.raises(
        EngineError,
        match=r"did not come up \(server_timeout is 1 s\) and was stopped(.|\n)*loading",
    ):
        while not server.ready():
            time.sleep(0.05)
    assert all(gone(pid) for pid in pids) and not server.alive


def test_a_port_of_the_user_that_is_taken_is_a_setting_error(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(fake_program)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(SettingError, match=f"server_port: {port} .* in use"):
            VLLMServer(ServerSettings(str(model), tmp_path, port=port), progress=quiet).start()


def test_a_free_port_that_somebody_takes_is_replaced(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    ports: list[int] = []

    def program(port: int, key_file: Path) -> list[str]:
        ports.append(port)
        busy = python("import sys; sys.exit('OSError: [Errno 98] Address already in use')")
        return (busy if len(ports) == 1 else fake_program)(port, key_file)

    pretend(program)
    server = VLLMServer(ServerSettings(str(model), tmp_path), progress=quiet).start()
    assert len(ports) == 2 and server.url.endswith(str(ports[1]))
    server.stop()


def test_one_replica_that_fails_stops_the_others(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    calls: list[int] = []

    def program(port: int, key_file: Path) -> list[str]:
        calls.append(port)
        wait, fail = "import time; time.sleep(600)", "raise SystemExit('no such device')"
        return python(wait if len(calls) == 1 else fail)(port, key_file)

    pretend(program)
    with pytest.raises(EngineError, match="vllm-1 ended while it started"):
        asyncio.run(start_servers(ServerSettings(str(model), tmp_path), 2, quiet))
    assert not list(tmp_path.glob("*.key"))


OWNER = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.rollouts.engines.vllm.test_server import *
vllm_server.vllm_version = lambda: ("0.0", True)
def fake_command(settings, port, on_cpu):
    return fake_program(port, Path(settings.folder) / "vllm-0.key")
vllm_server.command = fake_command
server = VLLMServer(ServerSettings({model!r}, Path({folder!r})), progress=quiet).start()
if os.fork() == 0:  # a child that inherits the pipe to the supervisor, and lives on
    time.sleep(20)
    os._exit(0)
print(group_of(server)[0], flush=True)
time.sleep(600)
"""


def test_no_server_outlives_an_owner_that_is_killed(model: Path, tmp_path: Path):
    code = OWNER.format(root=str(ROOT), model=str(model), folder=str(tmp_path))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert gone(pid)


def test_no_server_outlives_its_supervisor(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(fake_program)
    server = VLLMServer(ServerSettings(str(model), tmp_path), progress=quiet).start()
    [pid] = group_of(server)
    assert server.supervisor_pid is not None
    os.kill(server.supervisor_pid, signal.SIGKILL)
    assert gone(pid)
    server.stop()


def test_children_of_a_server_that_died_are_ended(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(python("import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"))
    server = VLLMServer(ServerSettings(str(model), tmp_path), progress=quiet)
    with pytest.raises(EngineError):
        server.start()
    assert gone(int(server.tail().splitlines()[-1]))


# a dead server is started again


def test_a_killed_server_comes_back_with_its_adapters_and_the_result_is_the_same(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(fake_program)
    folder = adapter(tmp_path / "versions", "solver-v1-aa")
    lines: list[str] = []
    settings = ServerSettings(str(model), tmp_path, policies=TEAM[:1], max_restarts=1)
    server = VLLMServer(settings, progress=lines.append).start()
    ref, draw, quick = (
        ModelRef("solver", "solver-v1-aa"),
        Sampling(max_tokens=6, seed=3),
        ReplicaPolicy(backoff=0.05, stall=1.0),
    )
    engine = VLLMEngine([server], Tokens(), adapter_root=tmp_path / "versions", retry=quick)

    async def run() -> None:
        await engine.publish({"solver": folder})
        os.kill(group_of(server)[0], signal.SIGKILL)
        replies = await asyncio.gather(*(engine.generate([5, k], ref, draw) for k in range(8)))
        assert [reply.token_ids for [reply] in replies] == [
            tuple(sampled("solver-v1-aa", [5, k], 3, 6)) for k in range(8)
        ]
        assert await engine.adapters("vllm-0") == {"solver-v1-aa": str(folder)}
        assert any("Starting it again (1)" in line for line in lines)
        os.kill(group_of(server)[0], signal.SIGKILL)
        with pytest.raises(
            EngineError,
            match=r"vllm-0 .* is dead: .*started again 1 times(.|\n)*End of .*vllm-0\.log",
        ):
            await engine.generate([5], ref, draw)
        await engine.close()

    asyncio.run(run())
    assert not server.alive


def test_a_cpu_server_whose_workers_lack_our_lora_is_refused(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(
        lambda port, key_file: [
            sys.executable,
            "-c",
            f"print = lambda *a, **k: None; exec({FAKE.read_text()!r})",
            str(port),
            str(key_file),
        ]
    )
    with pytest.raises(EngineError, match=r"vllm-0: its workers did not load .*cpu_lora"):
        VLLMServer(ServerSettings(str(model), tmp_path, policies=TEAM[:1]), progress=quiet).start()
    assert not list(tmp_path.glob("*.key"))


def test_an_adapter_above_the_servers_rank_is_named(
    model: Path, tmp_path: Path, pretend: Callable[..., None]
):
    pretend(fake_program)
    server = VLLMServer(
        ServerSettings(str(model), tmp_path, policies=TEAM[:1]), progress=quiet
    ).start()
    engine = VLLMEngine([server], Tokens(), adapter_root=tmp_path / "versions")
    info = engine.info()
    assert (info.kind, info.base, info.dtype, info.max_rank, info.replicas) == (
        "vllm",
        str(model),
        "float32",
        8,
        ("vllm-0",),
    )

    async def run() -> None:
        with pytest.raises(SettingError, match="rank 9 is above the server's 8"):
            await engine.publish({"solver": adapter(tmp_path / "versions", "solver-v1-aa", rank=9)})
        await engine.close()

    asyncio.run(run())


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise server_args.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(server_args.importlib.metadata, "version", missing)
    with pytest.raises(SettingError, match=r"marlora\[vllm\]"):
        server_args.vllm_version()


@pytest.mark.slow
def test_vllms_own_parser_checks_engine_args():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(
        SettingError, match=r"engine_args\.max_num_seqz.*did you mean 'max_num_seqs'"
    ):
        check_engine_args({"max_num_seqz": 4})
    with pytest.raises(SettingError, match=r"max-num-seqs.*invalid"):
        check_engine_args({"max_num_seqs": "many"})
    check_engine_args({"max_num_seqs": 4, "enable_prefix_caching": False, "block_size": 64})
