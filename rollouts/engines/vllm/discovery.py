"""Servers on other nodes, found by files: each server node writes where its servers are, trainers
wait for as many as they need.

A file is `{"servers": [{"url": ..., "key_file": ..., "model": ...}]}`; a folder of such files is as
good as one. Keys stand in files of their own that only their owner may read, on the file system
that all nodes share (as adapter folders are).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....agents.secrecy import check_url, not_shown
from ....agents.types import SettingError, from_json, to_json
from ...files import write_text
from ..base import EngineError
from .server import VLLMServer, start_servers
from .server_args import ServerSettings, served_dtype

POLL = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Endpoint:
    """A server that others started. `key_file` "" is a server without a key; `dtype` "" is one that
    does not say of its weights."""

    url: str
    key_file: str = field(default="", repr=False)  # if it is no path after all, it may be a key
    model: str = ""
    dtype: str = ""


def write_endpoints(path: Path, found: Sequence[Endpoint]) -> None:
    """Replace the file of endpoints atomically: others read it at any time."""
    write_text(path, json.dumps({"servers": to_json(list(found))}, indent=2) + "\n")


def read_endpoints(path: Path, model: str) -> list[Endpoint]:
    """Servers of this model in a file, or in all files of a folder; those that name no model serve
    any. [] if there is none yet."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.exists() else []
    found: list[Endpoint] = []
    for file in files:
        try:
            entries = json.loads(file.read_text())["servers"]
            found += [
                _endpoint(entry, f"endpoints {file}: servers[{i}]")
                for i, entry in enumerate(entries)
            ]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, SettingError):
                raise
            raise SettingError(
                f'endpoints {file}: expected {{"servers": [{{"url": ..., "key_file": ...}}]}}'
                f" ({error!r})"
            ) from error
    return [endpoint for endpoint in found if endpoint.model in ("", model)]


def _endpoint(entry: Any, where: str) -> Endpoint:
    """One server of a file. What may be a key is checked first, since other errors show the value
    that is wrong."""
    if not isinstance(entry, Mapping):
        raise SettingError(f"{where}: expected an object with url and key_file; {not_shown(entry)}")
    if "url" in entry:
        check_url(f"{where}.url", entry["url"])
    if not isinstance(entry.get("key_file", ""), str):
        raise SettingError(
            f"{where}.key_file: expected the path of a file; {not_shown(entry['key_file'])}"
        )
    return from_json(Endpoint, entry, where)


async def wait_for_endpoints(
    path: Path, model: str, count: int, seconds: float, say: Callable[[str], None]
) -> list[Endpoint]:
    """At least `count` servers of this model. Raises `EngineError` when they are not there after so
    many seconds."""
    end, told = time.monotonic() + seconds, -1
    while len(found := read_endpoints(path, model)) < count:
        if time.monotonic() > end:
            raise EngineError(
                f"endpoints {path}: {len(found)} of {count} servers of {model} after {seconds:.0f}"
                " s (server_timeout)"
            )
        if told != len(found):
            told = len(found)
            say(f"waiting for servers: {told} of {count} in {path}")
        await asyncio.sleep(POLL)
    return found


def serve_endpoints(
    settings: Sequence[ServerSettings], path: Path, say: Callable[[str], None]
) -> None:
    """Start servers on this node (one set per base), write where they are, start dead ones again,
    until an exception comes.

    Raises `EngineError` when a server may not be started again. When this ends, the file and the
    servers are gone.
    """
    servers: list[VLLMServer] = []
    restarts: dict[str, int] = {}
    try:
        for wanted in settings:
            if len(set(wanted.devices)) < len(wanted.devices):
                raise SettingError(
                    f"server_devices: a device is named twice in {list(wanted.devices)}"
                )
            servers += asyncio.run(start_servers(wanted, len(wanted.devices), say))
        tell(path, servers)
        while True:
            time.sleep(POLL)
            for number, server in enumerate(servers):
                if not server.alive:
                    restarts[server.name] = restarts.get(server.name, 0) + 1
                    if restarts[server.name] > server.settings.max_restarts:
                        raise EngineError(
                            f"{server.name} died {restarts[server.name]} times. End of"
                            f" {server.log}:\n{server.tail()}"
                        )
                    say(f"{server.name} is dead; starting it again\n{server.tail()}")
                    servers[number] = again(server).start()
                    tell(path, servers)
    finally:
        path.unlink(missing_ok=True)
        for server in servers:
            server.stop()


def again(server: VLLMServer) -> VLLMServer:
    """A server in the place of a dead one, at the same address, with a new key."""
    server.stop()
    port = int(server.url.rsplit(":", 1)[1])
    return VLLMServer(
        replace(server.settings, port=port - server.index), server.index, server.progress
    )


def tell(path: Path, servers: Sequence[VLLMServer]) -> None:
    found = [
        Endpoint(s.url, str(s.key_file), s.settings.model, served_dtype(s.settings))
        for s in servers
    ]
    write_endpoints(path, found)
