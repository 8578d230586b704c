"""Seconds until the report of 10,000 episodes is written, and until it is set up in a browser:
python -m benchmarks.scripts.report"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import yaml

from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.report import write_report
from tests.browser import browser
from tests.rollouts.report.test_browser import episode


async def measure(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        yaml.safe_dump({"model": "tiny", "max_steps": 10, "rewards": ["correct"]}), encoding="utf-8"
    )
    with Store(run / "episodes", fsync=False) as store:
        store.extend([episode(1 + n // 1000, n) for n in range(10_000)])
    start = time.perf_counter()
    path = write_report(run)
    print(f"written after {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
    async with browser(folder / "profile") as page:
        for _ in range(5):
            await page.call("Page.navigate", url="about:blank")
            await page.open(path.as_uri())
            nodes = await page.run('document.querySelectorAll("*").length')
            print(
                f"set up {await page.run('performance.now()') / 1000:.2f} s after navigation,"
                f" {nodes} nodes, errors {page.errors}"
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(Path(scratch)))
