"""The documentation site builds, and refuses what would be broken on it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.hooks import api_sections
from marlora.agents.settings import Settings
from marlora.rollouts.engines.base import Engine
from marlora.trainers.values.parts import Part
from tests.browser import browser
from tests.demo_page import IMAGES, LARGEST_PICTURE, LARGEST_REPORT, REPORT, VIEWS
from tests.llms_page import PAGE, page
from tests.repository import ROOT, copy_to

SHOWN = (
    *("index", "methods", "methods/grpo_team", "guides/index", "tutorials/team", "demo/index"),
    *("reference/formats", "reference/cli", "reference/api/teams", "settings"),
    *("project/results", "project/comparison"),
)
PUBLIC = sorted(name for names in api_sections().values() for name in names)


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build --strict` of the repository in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_the_site_builds(site: Path) -> None:
    for name in SHOWN:
        assert (site / f"{name}.html").stat().st_size > 10_000, name
    assert (site / "demo" / "report.html").read_bytes() == REPORT.read_bytes()
    assert (site / "llms.txt").is_file()


@pytest.mark.slow
def test_pages_fit_a_phone_and_ask_nobody(site: Path, tmp_path: Path) -> None:
    """What is wide scrolls in its own box; nothing is fetched from elsewhere."""

    async def look() -> None:
        async with browser(tmp_path) as page:
            size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
            await page.call("Emulation.setDeviceMetricsOverride", **size)
            for name in SHOWN:
                await page.call("Page.navigate", url=(site / f"{name}.html").as_uri())
                await page.until(
                    f"location.pathname.endsWith('/{name}.html')"
                    " && document.readyState === 'complete'",
                    f"{name} is loaded",
                )
                wide = await page.run("document.documentElement.scrollWidth")
                assert wide <= 390, f"{name} is {wide} pixels wide"
            assert not page.errors
            assert all(url.startswith(("file:", "data:", "blob:")) for url in page.requests)

    asyncio.run(look())


@pytest.mark.slow
def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    copy = copy_to(tmp_path / "copy")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    for folder in ("methods", "tutorials", "reference"):
        shutil.rmtree(copy / "docs" / folder, ignore_errors=True)
    (copy / "docs" / "api.md").write_text("# Public names\n")
    (copy / "docs" / "guides" / "wrong.md").write_text("# Wrong\n\n[nowhere](nowhere.md)\n")
    refused = build(copy, tmp_path / "other")
    assert refused.returncode != 0 and "nowhere.md" in refused.stderr


def test_the_live_example_and_its_pictures_are_small() -> None:
    assert REPORT.stat().st_size <= LARGEST_REPORT
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "docs/demo/index.md" in readme and "docs/images/report_learning.png" in readme
    for name in VIEWS:
        assert (IMAGES / f"{name}.png").stat().st_size <= LARGEST_PICTURE


def test_llms_txt_is_todays() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_and_their_methods_have_docstrings(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert inspect.getdoc(found), f"{name}: no docstring"
    for method, value in vars(found).items() if inspect.isclass(found) else ():
        function: Any = value.fget if isinstance(value, property) else value
        if method.startswith("_") or not inspect.isfunction(inspect.unwrap(function)):
            continue
        documented = inspect.getdoc(value if isinstance(value, property) else function)
        inherited = [getattr(c, method, None) for c in (*found.__mro__[1:], Part, Engine)]
        if issubclass(found, Settings) and method in ("check", "prepare"):
            continue  # the docstring of Settings says what they are
        assert documented or any(map(inspect.getdoc, filter(None, inherited))), (
            f"{name}.{method}: no docstring"
        )
