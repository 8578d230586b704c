"""ASGI middleware with an API key and an allow-list of routes, for the vLLM servers started here.

vLLM loads it with `--middleware marlora.rollouts.engines.vllm.auth.Guard`. Its own `--api-key`
leaves routes open that generate, load any folder as an adapter and delete adapters. Behind this
middleware only the routes and methods that marlora uses exist, and all but `GET /health` need the
key. Standard library only, since it is imported inside the server's process.
"""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

# environment variable with the path of the key file; the key itself is in no environment
KEY_FILE = "MARLORA_KEY_FILE"
# ending of the file beside it that holds the server's URL
URL_FILE = ".url"

OPEN = {("GET", "/health")}
ROUTES = {
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    # for external programs at a served checkpoint; marlora itself sends token ids
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
}

Send = Callable[[Mapping[str, Any]], Awaitable[None]]


def read_key(path: str | Path) -> str:
    """The key in a file that only its owner may read. Raises `ValueError` when others may, or when
    it is short or no line."""
    path = Path(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(f"key file {path}: only its owner may read it; run chmod 600 {path}")
    try:
        key = path.read_bytes().strip().decode("ascii")
    except UnicodeDecodeError:
        key = "\0"
    if not key.isprintable():
        raise ValueError(f"key file {path}: expected one line of printable ASCII")
    if len(key) < 16:
        raise ValueError(f"key file {path}: at least 16 characters expected, got {len(key)}")
    return key


class Guard:
    """The middleware: 401 without the key, 403 for a route that is not in `ROUTES`. A server whose
    key file cannot be read does not start."""

    def __init__(self, app: Callable[..., Awaitable[None]], key_file: str | Path = "") -> None:
        path = key_file or os.environ.get(KEY_FILE)
        if not path:
            raise ValueError(f"environment variable {KEY_FILE}: expected the path of the key file")
        self.app = app
        self.expected = f"Bearer {read_key(path)}".encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            # a websocket: closing it before it is accepted refuses the handshake
            return await send({"type": "websocket.close", "code": 1008})
        route = (scope["method"], scope["path"])
        if route in OPEN:
            return await self.app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self.expected):
            return await _refuse(send, 401, "a key is needed")
        if route not in ROUTES:
            return await _refuse(send, 403, "this route is not served")
        return await self.app(scope, receive, send)


async def _refuse(send: Send, status: int, why: str) -> None:
    body = f'{{"error": "{why}"}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
