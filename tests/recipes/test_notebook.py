"""The ten lines of the README, as they stand, in a Jupyter notebook: they learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def ten_lines() -> str:
    """The README's example."""
    text = README.read_text(encoding="utf-8")
    code = text.partition("## Ten lines that learn")[2].partition("```python\n")[2]
    return code.partition("```")[0]


@pytest.mark.process
@pytest.mark.slow
def test_ten_lines_through_nbconvert(tmp_path: Path) -> None:
    import nbformat

    run = tmp_path / "runs" / "first"
    book = nbformat.v4.new_notebook()
    cells = [ten_lines(), "trainer.evaluate(2)"]
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(book, tmp_path / "book.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    done = subprocess.run(
        [*command, "--output", "done.ipynb", "book.ipynb"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path / "ipython")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / "done.ipynb", 4).cells
    printed = "".join(output.get("text", "") for output in cells[0].outputs)
    assert "'accuracy'" in printed and "'paired'" in printed
    shown = [output["data"]["text/html"] for output in cells[0].outputs if "data" in output]
    assert len(shown) == 1, "one display of the training"
    assert "step 12 of 12" in shown[0] and "first/report.html</a>" in shown[0]
    evaluation, result = (output["data"] for output in cells[1].outputs if "data" in output)
    assert "text/html" in evaluation and "'num_tasks': 2" in result["text/plain"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["eval"]["paired"]["ci95"][0] > 0
    assert "<svg viewBox=" in (run / "report.html").read_text(encoding="utf-8")
