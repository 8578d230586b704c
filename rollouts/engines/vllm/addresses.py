"""Servers that others run: their addresses, their keys, and whether strangers could use or change
them."""

from __future__ import annotations

import os

from ....agents.secrecy import check_key_name, check_url, usable_key
from ....agents.types import SettingError
from .auth import read_key
from .server import http

# An empty body is invalid for each of these, so nothing happens; but only an open door says so.
# vLLM's own --api-key leaves /invocations and /adapters open. Routes that do something without a
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
    """Routes that answer without a key."""
    found = []
    for method, path in ROUTES:
        try:
            status, _ = http(url + path, "", method, {} if method == "POST" else None)
        except OSError as error:
            raise SettingError(
                f"server_urls: no answer from {url} ({error}); is it running and reachable from"
                " here?"
            ) from error
        if status not in CLOSED:
            found.append(f"{method} {path}")
    return found


def refuse_open(url: str) -> None:
    """Raise `SettingError` if anybody who reaches the server can generate, load adapters or delete
    them."""
    found = open_routes(url)
    if found:
        raise SettingError(
            f"server {url} is open: without a key it answers {', '.join(found)}. Start it with"
            " --middleware marlora.rollouts.engines.vllm.auth.Guard and MARLORA_KEY_FILE=FILE, or"
            " accept that with allow_open_server"
        )
