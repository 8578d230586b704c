"""Service discovery through files, and checks of servers that are given by URL.

Each server node writes a file of endpoints, trainers wait until as many servers as they need are
listed. A file is `{"servers": [{"url": ..., "key_file": ..., "model": ...}]}`; a folder of such
files serves as well. Keys are in files of their own that only their owner may read, on the file
system that all nodes share (as adapter folders are). A server that answers without a key is refused
unless `allow_open_server` is set.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....agents.text.secrecy import check_key_name, check_url, not_shown, usable_key
from ....agents.types import SettingError, from_json, to_json
from ...files import write_text
from ...http import fetch
from ..base import EngineError
from .auth import read_key
from .server import VLLMServer, start_servers
from .server_args import ServerSettings, served_dtype

POLL = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Endpoint:
    """A server that another process started. `key_file` "": it has no key; `dtype` "": the dtype of
    its weights is not known."""

    url: str
    key_file: str = field(default="", repr=False)  # if it is no path after all, it may be a key
    model: str = ""
    dtype: str = ""


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Replace the file of endpoints atomically: others read it at any time."""
    write_text(path, json.dumps({"servers": to_json(list(endpoints))}, indent=2) + "\n")


def read_endpoints(path: Path, model: str) -> list[Endpoint]:
    """Servers of this model in a file, or in all files of a folder; those that name no model serve
    any. [] if there is none yet."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.exists() else []
    endpoints: list[Endpoint] = []
    for file in files:
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))["servers"]
            endpoints += [
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
    return [endpoint for endpoint in endpoints if endpoint.model in ("", model)]


def _endpoint(entry: Any, where: str) -> Endpoint:
    """One server of a file. Values that may be a key are checked first, since other errors show the
    value that is wrong."""
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
    many seconds (`server_timeout`)."""
    end, shown = time.monotonic() + seconds, -1
    while len(endpoints := read_endpoints(path, model)) < count:
        if time.monotonic() > end:
            raise EngineError(
                f"endpoints {path}: {len(endpoints)} of {count} servers of {model} after"
                f" {seconds:.0f} s (server_timeout)"
            )
        if shown != len(endpoints):
            shown = len(endpoints)
            say(f"waiting for servers: {shown} of {count} in {path}")
        await asyncio.sleep(POLL)
    return endpoints


def serve_endpoints(
    settings: Sequence[ServerSettings], path: Path, say: Callable[[str], None]
) -> None:
    """Start servers on this node (one set per base), write their endpoints, start dead ones again,
    until an exception comes: at their old ports, if nobody has taken those.

    Raises `EngineError` when a server may not be started again. When this ends, the file and the
    servers are gone.
    """
    servers: list[VLLMServer] = []
    restarts: dict[str, int] = {}
    try:
        for one in settings:
            if len(set(one.devices)) < len(one.devices):
                raise SettingError(
                    f"server_devices: a device is named twice in {list(one.devices)}"
                )
            servers += asyncio.run(start_servers(one, len(one.devices), say))
        write_endpoints(path, [_endpoint_of(server) for server in servers])
        while True:
            time.sleep(POLL)
            for server in servers:
                if not server.alive:
                    restarts[server.name] = restarts.get(server.name, 0) + 1
                    if restarts[server.name] > server.settings.max_restarts:
                        raise EngineError(
                            f"{server.name} died {restarts[server.name]} times. End of"
                            f" {server.log}:\n{server.tail()}"
                        )
                    say(f"{server.name} is dead; starting it again\n{server.tail()}")
                    server.stop()
                    server.start()
                    write_endpoints(path, [_endpoint_of(server) for server in servers])
    finally:
        path.unlink(missing_ok=True)
        for server in servers:
            server.stop()


def _endpoint_of(server: VLLMServer) -> Endpoint:
    settings = server.settings
    return Endpoint(server.url, str(server.key_file), settings.model, served_dtype(settings))


# servers that are given by URL

# An empty body is invalid for each of these routes, so nothing happens; but only an open server
# answers so. vLLM's own --api-key leaves /invocations and /adapters open. Routes that act without a
# body (/sleep) are not tried; /server_info shows the developer mode that opens them.
ROUTES = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/invocations"),
    ("POST", "/adapters"),
    ("GET", "/server_info"),
)
CLOSED = (401, 403, 404, 405)


def tidy(url: str) -> str:
    """`http://host:8000/v1/` -> `http://host:8000`. Raises `SettingError` for what is no URL, or
    may hold a key."""
    return check_url("server_urls", url).rstrip("/").removesuffix("/v1")


def key_from(name: str, setting: str = "server_key") -> str:
    """The key in the environment variable of this name, or in the file at this path (readable by
    its owner only). "" -> ""."""
    check_key_name(setting, name)
    if not name:
        return ""
    if name in os.environ:
        return usable_key(f"{setting}: environment variable {name}", os.environ[name])
    try:
        return read_key(name)
    except OSError as error:
        raise SettingError(f"{setting}: the key file cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SettingError(f"{setting}: {error}") from error


def open_routes(url: str) -> list[str]:
    """Routes of `ROUTES` that the server answers without a key."""
    routes = []
    for method, path in ROUTES:
        try:
            status, _ = fetch(url + path, "", method, {} if method == "POST" else None)
        except OSError as error:
            raise SettingError(
                f"server_urls: no answer from {url} ({error}); is it running and reachable from"
                " here?"
            ) from error
        if status not in CLOSED:
            routes.append(f"{method} {path}")
    return routes


def refuse_open(url: str) -> None:
    """Raise `SettingError` if requests without a key can generate, load adapters or delete them."""
    routes = open_routes(url)
    if routes:
        raise SettingError(
            f"server {url} is open: without a key it answers {', '.join(routes)}. Start it with"
            " --middleware marlora.rollouts.engines.vllm.auth.Guard and MARLORA_KEY_FILE=FILE, or"
            " accept that with allow_open_server"
        )
