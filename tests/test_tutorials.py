"""The tutorials: notebooks that are committed with their outputs, and that run as they stand."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.repository import ROOT

FOLDER = ROOT / "docs" / "tutorials"
NAMES = ("team", "credit_rule", "prompts_then_weights", "workflow_search", "comparison")
LARGEST = 150_000  # bytes of a notebook, outputs included
SECONDS = 600  # that a cell may take on a machine that others use too


def notebook(name: str) -> dict[str, Any]:
    book: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return book


def outputs(book: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for cell in book["cells"] for each in cell.get("outputs", ())]


def test_every_tutorial_is_known() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_reads_well(name: str) -> None:
    """It was run from its first cell to its last, ends with a plot, and says nothing of the machine
    it ran on."""
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size <= LARGEST
    book = notebook(name)
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = outputs(book)
    assert not any(each["output_type"] == "error" for each in shown)
    assert not any(each.get("name") == "stderr" for each in shown)
    assert any("image/png" in each.get("data", {}) for each in code[-1]["outputs"])
    assert book["cells"][0]["source"][0].startswith("# ")
    assert book["cells"][-1]["cell_type"] == "markdown"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_tutorial_hold(name: str) -> None:
    prose = "".join(
        "".join(cell["source"])
        for cell in notebook(name)["cells"]
        if cell["cell_type"] == "markdown"
    )
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    assert targets
    for target in targets:
        assert (FOLDER / target).exists(), f"{name} links to {target}, which does not exist"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell as it stands, in an empty folder, and draws its plot. What a tutorial claims, it
    asserts itself."""
    import nbformat
    from nbclient import NotebookClient

    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for setting, value in (
        ("PATH", path),
        ("OMP_NUM_THREADS", "1"),
        ("IPYTHONDIR", str(tmp_path / "ipython")),
    ):
        monkeypatch.setenv(setting, value)
    book = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (tmp_path / "here").mkdir()
    client = NotebookClient(
        book, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path / "here")}}
    )
    client.execute()
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert any("image/png" in each.get("data", {}) for each in code[-1].outputs)
