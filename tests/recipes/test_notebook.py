"""The ten lines of the README in a Jupyter notebook, as `jupyter nbconvert` executes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlora.trainers.testbeds.tiny import tiny_random_model

README = Path(__file__).parents[2] / "README.md"
SMALL = (
    'engine="transformers", max_steps=1, tasks_per_step=2, num_generations=2,'
    " max_completion_length=4, lora_r=2, num_eval_tasks=3"
)


def ten_lines(model: Path, output: Path) -> str:
    """The README's example with a tiny model and one short step."""
    text = README.read_text(encoding="utf-8")
    code = text.partition("## Ten lines of your own")[2].partition("```python\n")[2]
    code = code.partition("```")[0]
    for old, new in (
        ("Qwen/Qwen2.5-0.5B-Instruct", str(model)),
        ('output_dir="runs/first"', f'output_dir="{output}", {SMALL}'),
    ):
        assert old in code, "the README's example has changed"
        code = code.replace(old, new)
    return code


@pytest.mark.process
@pytest.mark.slow
def test_ten_lines_through_nbconvert(tmp_path: Path) -> None:
    import nbformat

    run = tmp_path / "first"
    book = nbformat.v4.new_notebook()
    cells = [ten_lines(tiny_random_model(tmp_path / "model"), run), "trainer.evaluate(2)"]
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
    assert "'accuracy'" in printed and "'num_tasks': 3" in printed
    shown = [output["data"]["text/html"] for output in cells[0].outputs if "data" in output]
    assert len(shown) == 2, "one display of the training, one of the evaluation"
    assert "step 1 of 1" in shown[0] and "first/report.html</a>" in shown[0]
    assert "'num_tasks': 2" in cells[1].outputs[-1]["data"]["text/plain"]
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    assert "<svg viewBox=" in (run / "report.html").read_text(encoding="utf-8")
