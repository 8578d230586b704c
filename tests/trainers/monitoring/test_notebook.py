"""Progress in a notebook: one output that is changed in place, with the report linked."""

from __future__ import annotations

import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import Task
from marlora.rollouts.types import Episode
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.monitoring.notebook import NotebookProgress, curve, progress_here


class Shell:
    """Stands for IPython: what its kernel shows."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.shown: list[tuple[str, bool, dict[str, str]]] = []
        self.display = types.SimpleNamespace(display=self.publish)

    def get_ipython(self) -> Shell:
        return self

    def publish(
        self, content: dict[str, str], *, raw: bool, display_id: str, update: bool = False
    ) -> None:
        assert raw
        self.shown.append((display_id, update, content))

    @property
    def html(self) -> str:
        return self.shown[-1][2]["text/html"]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    shell = Shell(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", shell)  # type: ignore[arg-type]
    return shell


def episode(number: int, parent: str | None = None) -> Episode:
    return Episode(f"e{number}", "g", Task("t", "?"), parent=parent)


def test_only_a_notebooks_kernel_has_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, expected in (
        (Shell(kernel=object()), True),
        (Shell(kernel=None), False),  # IPython on a terminal
        (None, False),
    ):
        monkeypatch.setitem(sys.modules, "IPython", module)  # type: ignore[arg-type]
        assert isinstance(progress_here(True), NotebookProgress) == expected
        assert not isinstance(progress_here(False), NotebookProgress)


def test_a_run_is_one_output(shell: Shell, tmp_path: Path, capsys: Any) -> None:
    progress = progress_here(True)
    progress.say("engine: transformers")
    progress.keep_warnings(tmp_path / "warnings.log")
    progress.start(0, 2)
    with progress.episodes("step 1", 4, 1, "exact") as tick:
        tick(episode(1))
        tick(episode(2, parent="e1"))
        progress.warn("<b>slow</b>")
        assert "step 1 2/4" in shell.html
    progress.step(1, {"reward": 0.25})
    progress.step(2, {"reward": 0.75, "budget": {"tokens": 12345, "cost": 0}})
    assert "report" not in shell.html
    (tmp_path / "report.html").write_text("", encoding="utf-8")
    progress.close()
    assert len({name for name, _, _ in shell.shown}) == 1
    assert [update for _, update, _ in shell.shown] == [False] + [True] * (len(shell.shown) - 1)
    page = shell.html
    assert '<progress value="2" max="2">' in page and "step 2 of 2, reward 0.750" in page
    assert "12,345 tokens spent" in page and "step 1 2/4" not in page
    assert "&lt;b&gt;slow&lt;/b&gt;" in page and "<b>" not in page
    assert "report.html</a>" in page and "<polyline" in page
    assert (tmp_path / "warnings.log").read_text(encoding="utf-8") == "<b>slow</b>\n"
    assert "warning: <b>slow</b>" in shell.shown[-1][2]["text/plain"]
    assert capsys.readouterr() == ("", ""), "all of it stands in the display"


def test_what_is_shown_often_is_published_seldom(shell: Shell) -> None:
    progress = progress_here(True)
    with progress.episodes("eval", 1000, 0, "exact") as tick:
        for number in range(1000):
            tick(episode(number))
    assert len(shell.shown) < 100


def test_the_curve_stands_where_the_rewards_are() -> None:
    drawn = ET.fromstring(curve([(1, 0.0), (2, 0.5), (3, 1.0)]))
    line = drawn.find("polyline")
    assert line is not None and line.get("points") == "0.0,48.0 120.0,24.0 240.0,0.0"
    line = ET.fromstring(curve([(5, -1.0), (6, 1.0)])).find("polyline")
    assert line is not None and line.get("points") == "0.0,48.0 240.0,0.0"


def test_a_trainer_says_what_it_is_and_links_its_report(model: Path, tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path / "<run>"), max_steps=3)
    tasks = [Task(str(n), f"{n}+0", str(n)) for n in range(3)]
    trainer = GRPOTrainer(
        str(model), Chain(["a", "b"]), tasks[:2], args, eval_tasks=tasks[2:], rewards=["exact"]
    )
    assert repr(trainer) == (
        f"GRPOTrainer(model={str(model)!r}, system=Chain[a, b], tasks=[2 train, 1 eval],"
        f" rewards=[exact], output_dir='{tmp_path}/<run>', max_steps=3, step=0)"
    )
    assert "&lt;run&gt;" in trainer._repr_html_() and "href" not in trainer._repr_html_()
    (tmp_path / "<run>").mkdir()
    (tmp_path / "<run>" / "report.html").write_text("", encoding="utf-8")
    assert "&lt;run&gt;/report.html</a>" in trainer._repr_html_()
