"""docs/demo/report.html, the report of a small run as a live example, and pictures of it.

`python -m tests.demo_page` trains the tiny model for a minute and writes the report and, with
headless Chromium, docs/images/report_*.png. `--pictures` makes the pictures anew from the report.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.browser import Browser, browser
from tests.repository import ROOT, clean_environment

REPORT = ROOT / "docs" / "demo" / "report.html"
IMAGES = ROOT / "docs" / "images"
LARGEST_REPORT, LARGEST_PICTURE = 400_000, 150_000  # bytes
RUN = "runs/demo-report"  # below a temporary folder: the report names it
SETTINGS = (
    *("--max_steps", "5", "--tasks_per_step", "20", "--num_generations", "2"),
    *("--num_eval_tasks", "60", "--ablate_adapters", "false"),
)
COLORS = 128  # of a picture: a page of text and lines needs no more
VIEWS = {  # picture: width, height, dark, and what is done on the page first
    "report_learning": (1200, 760, False, "window.scrollTo(0, 0)"),
    "report_dark": (1200, 760, True, "window.scrollTo(0, 0)"),
    "report_phone": (390, 760, False, "window.scrollTo(0, 0)"),
}


def train(folder: Path) -> Path:
    """Train in a folder; the report's path. Raises `CalledProcessError` if that fails."""
    command = [sys.executable, "-m", "marlora.recipes.sft_team", "--output_dir", RUN, *SETTINGS]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True)
    return folder / RUN / "report.html"


async def look(page: Browser, url: str, name: str) -> None:
    """Take one picture of the report."""
    from PIL import Image  # comes with matplotlib; the test of the sizes needs it not

    width, height, dark, script = VIEWS[name]
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    await page.call("Emulation.setDeviceMetricsOverride", **size)
    await page.dark(dark)
    await page.open(url)
    await page.run(script)
    await asyncio.sleep(0.5)  # transitions
    path = IMAGES / f"{name}.png"
    await page.picture(path, whole=False)
    Image.open(path).convert("RGB").quantize(COLORS).save(path, optimize=True)
    assert not page.errors, f"{name}: {page.errors}"


async def pictures(report: Path) -> None:
    """Take all pictures of a report."""
    with tempfile.TemporaryDirectory() as profile:
        async with browser(Path(profile)) as page:
            for name in VIEWS:
                await look(page, report.as_uri(), name)


if __name__ == "__main__":
    if "--pictures" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            REPORT.parent.mkdir(exist_ok=True)
            shutil.copy(train(Path(folder)), REPORT)
    asyncio.run(pictures(REPORT))
