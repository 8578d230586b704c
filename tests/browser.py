"""A headless Chromium over its DevTools protocol: open a page, run script in it, press keys, and
hear of every error."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium on PATH; on Debian and Ubuntu: apt-get install chromium (.ci/run does)"
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--remote-debugging-port=0",
    "--window-size=1280,900",
)


class Browser:
    """One page. `errors`: what went to its console as an error, exceptions, and what its policy
    (CSP) refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.errors = socket, list[str]()
        self.requests: list[str] = []
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            data = json.loads(message.data)
            if "id" in data:
                self._waiting.pop(data["id"]).set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                self.errors.append(
                    data["params"]["exceptionDetails"]
                    .get("exception", {})
                    .get("description", "exception")
                )
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                self.errors.append(data["params"]["entry"]["text"])
            elif data["method"] == "Runtime.consoleAPICalled" and data["params"]["type"] == "error":
                self.errors.append(str(data["params"]["args"]))
            elif data["method"] == "Network.requestWillBeSent":
                self.requests.append(data["params"]["request"]["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        answer = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        await self.socket.send_str(
            json.dumps({"id": self._number, "method": method, "params": params})
        )
        data = await asyncio.wait_for(answer, 60)
        assert "error" not in data, f"{method}: {data['error']}"
        return dict(data["result"])

    async def run(self, script: str) -> Any:
        """The value of an expression (awaited if a promise)."""
        found = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    async def until(self, script: str, what: str = "") -> Any:
        """Wait until an expression is true."""
        for _ in range(600):
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {what or script}; errors: {self.errors}")

    async def open(self, url: str) -> None:
        """Go to a page of ours and wait until its script has set it up."""
        await self.call("Page.navigate", url=url)
        await self.until('document.documentElement?.dataset.ready === "yes"', f"{url} is ready")

    async def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def dark(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": value}],
        )

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        found = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Browser]:
    """A browser with its profile in `folder`, ended with the block."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path is not None, MISSING
    process = subprocess.Popen(
        [path, *OPTIONS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = await _port(folder / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                page = next(p for p in await reply.json() if p["type"] == "page")
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                made = Browser(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await made.call(f"{domain}.enable")
                yield made
                made._reader.cancel()
    finally:
        process.kill()
        process.wait(30)


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text().strip():
        assert process.poll() is None and time.monotonic() < deadline, (
            f"Chromium did not start (exit code {process.poll()})"
        )
        await asyncio.sleep(0.05)
    return int(file.read_text().splitlines()[0])
