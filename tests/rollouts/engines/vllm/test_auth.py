"""The guard, called as an ASGI server calls it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marlora.rollouts.engines.vllm.auth import KEY_FILE, ROUTES, Guard, read_key

KEY = "0123456789abcdef" * 2


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guard:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    monkeypatch.setenv(KEY_FILE, str(file))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return Guard(app)


def status(guard: Guard, method: str, path: str, *keys: str, kind: str = "http") -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", key.encode()) for key in keys]
    asyncio.run(
        guard({"type": kind, "method": method, "path": path, "headers": headers}, None, send)
    )
    return sent[0].get("status", sent[0])


def test_only_health_is_open(guard: Guard):
    assert status(guard, "GET", "/health") == 200
    assert status(guard, "POST", "/health") == 401
    for method, path in ROUTES:
        assert status(guard, method, path) == 401
        assert status(guard, method, path, f"Bearer {KEY}") == 200


@pytest.mark.parametrize(
    "key",
    [
        "",
        "Bearer",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}0",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}\u00e9",
    ],
)
def test_other_keys_are_refused(guard: Guard, key: str):
    assert status(guard, "POST", "/v1/completions", key) == 401


def test_two_keys_are_refused(guard: Guard):
    assert status(guard, "POST", "/v1/completions", f"Bearer {KEY}", f"Bearer {KEY}") == 401


PATHS = [
    "/invocations",
    "/adapters",
    "/tokenize",
    "/sleep",
    "/v1/completions/",
    "//v1/completions",
    "/metrics/x",
]


@pytest.mark.parametrize(
    "path", [*PATHS, "/v1/../invocations", "/V1/completions", "/openapi.json", ""]
)
def test_routes_we_do_not_use_do_not_exist_even_with_the_key(guard: Guard, path: str):
    assert status(guard, "POST", path) == 401
    assert status(guard, "POST", path, f"Bearer {KEY}") == 403


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "DELETE", "PUT", "GET"])
def test_other_methods_are_refused(guard: Guard, method: str):
    assert status(guard, method, "/v1/completions") == 401
    assert status(guard, method, "/v1/completions", f"Bearer {KEY}") == 403


def test_websockets_are_closed(guard: Guard):
    assert status(guard, "GET", "/v1/realtime", f"Bearer {KEY}", kind="websocket") == {
        "type": "websocket.close",
        "code": 1008,
    }


def test_lifespan_passes(guard: Guard):
    assert status(guard, "", "", kind="lifespan") == 200


def test_a_server_without_a_safe_key_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "key"
    monkeypatch.delenv(KEY_FILE, raising=False)
    with pytest.raises(ValueError, match=KEY_FILE):
        Guard(None)  # type: ignore[arg-type]
    file.write_text(KEY)
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(file)
    file.chmod(0o600)
    file.write_text("short")
    with pytest.raises(ValueError, match="16 characters"):
        read_key(file)


def test_it_imports_the_standard_library_alone():
    script = (
        "import sys; import marlora.rollouts.engines.vllm.auth; print(sorted(m for m in sys.modules"
        " if m.startswith('marlora')))"
    )
    heavy = (
        "; assert not {'torch', 'vllm', 'aiohttp', 'starlette', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script + heavy], capture_output=True, text=True, check=True
    )
    assert "'marlora.rollouts.engines.vllm.auth'" in done.stdout and "types" not in done.stdout
