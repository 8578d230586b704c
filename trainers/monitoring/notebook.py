"""Progress of a run as one HTML output of a notebook cell: a bar, the reward so far, warnings, a
log to open, and a link to the report once it is written."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...rollouts.report.html import text as escaped
from ...rollouts.types import Episode
from .progress import Progress, time_left

PAUSE = 0.2  # seconds between two updates of the display, at least
LINES = 200  # of the log, the newest
SIZE = (240, 48)  # of the curve, in pixels


def progress_here(show: bool, verbose: bool = False) -> Progress:
    """What shows a run where it runs: in a notebook one HTML display, elsewhere `Progress`."""
    return NotebookProgress(verbose) if show and in_notebook() else Progress(show, verbose)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. Imports nothing: a kernel has loaded IPython."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookProgress(Progress):
    """One output of the cell that runs, changed in place. The first thing to show makes it."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(show=False, verbose=verbose)
        self._lines: list[str] = []
        self._warnings: list[str] = []
        self._rewards: list[tuple[int, float]] = []
        self._playing: dict[str, tuple[int, int]] = {}  # what is played: (done, total)
        self._folder: Path | None = None
        self._done = 0
        self._last = ""  # the last step in a line
        self._display: str | None = None
        self._shown = 0.0
        self._lock = threading.Lock()  # episodes are counted in another thread

    def keep_warnings(self, path: Path) -> None:
        super().keep_warnings(path)
        self._folder = path.parent

    def say(self, text: str) -> None:
        self._lines = [*self._lines, text][-LINES:]
        self._show()

    def warn(self, text: str) -> None:
        super().warn(text)
        self._warnings.append(text)
        self._show(now=True)

    def start(self, done: int, total: int) -> None:
        super().start(done, total)
        self._done = done
        self._show(now=True)

    @contextlib.contextmanager
    def episodes(
        self, what: str, total: int, done: int, metric: str
    ) -> Iterator[Callable[[Episode], None]]:
        with super().episodes(what, total, done, metric) as tick:
            self._playing[what] = (done, total)

            def count(episode: Episode) -> None:
                tick(episode)
                if episode.parent is None:
                    self._playing[what] = (self._playing[what][0] + 1, total)
                self._show()

            try:
                yield count
            finally:
                del self._playing[what]

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        super().step(step, row)
        reward = row.get("reward")
        if reward is not None and math.isfinite(reward):
            self._rewards.append((step, float(reward)))
        self._done, spent = step, (row.get("budget") or {}).get("tokens")
        self._last = f"step {step} of {self._total}"
        self._last += f", reward {reward:.3f}" if reward is not None else ""
        self._last += f", {spent:,} tokens spent" if spent else ""
        left = time_left(self._ended, self._total - step)
        self._last += f", {left} left" if left else ""
        self._show(now=True)

    def sample(self, policy: str, pieces: Sequence[tuple[str, bool]]) -> None:
        marked = "".join(f"\u2038{piece}\u2038" if trained else piece for piece, trained in pieces)
        self.say(f"first batch of {policy!r} (trained tokens between the marks):\n{marked}")

    def close(self) -> None:
        super().close()
        if self._display is not None:
            self._show(now=True)

    def _show(self, now: bool = False) -> None:
        """Make or change the output, at most every `PAUSE` seconds unless `now`."""
        with self._lock:
            if not now and time.monotonic() - self._shown < PAUSE:
                return
            self._shown = time.monotonic()
            publish = sys.modules["IPython"].display.display
            content = {"text/html": self._html(), "text/plain": self._text()}
            if self._display is None:
                self._display = f"marlora-{os.urandom(8).hex()}"
                publish(content, raw=True, display_id=self._display)
            else:
                publish(content, raw=True, display_id=self._display, update=True)

    def _text(self) -> str:
        """What a viewer without HTML shows."""
        last = [self._last] if self._last else self._lines[-1:]
        return "\n".join([*last, *(f"warning: {warning}" for warning in self._warnings)])

    def _html(self) -> str:
        parts = []
        if self._total:
            parts.append(f'<progress value="{self._done}" max="{self._total}"></progress>')
        parts.append(escaped(self._last or (self._lines[-1] if self._lines else "")))
        parts += [
            f"<small>{escaped(what)} {done}/{total}</small>"
            for what, (done, total) in list(self._playing.items())
        ]
        blocks = [f"<div>{' '.join(parts)}</div>"]
        if len(self._rewards) > 1:
            blocks.append(f"<div>{curve(self._rewards)}</div>")
        blocks += [f"<div>⚠ {escaped(warning)}</div>" for warning in self._warnings]
        if self._lines:
            lines = "\n".join(map(escaped, self._lines))
            blocks.append(f"<details><summary>log</summary><pre>{lines}</pre></details>")
        blocks.append(report_link(self._folder))
        return "".join(blocks)


def report_link(folder: Path | None) -> str:
    """A link to a run folder's report, relative to where the notebook runs; "" while there is
    none."""
    report = None if folder is None else folder / "report.html"
    if report is None or not report.is_file():
        return ""
    place = escaped(os.path.relpath(report))
    return f'<div>report: <a href="{place}" target="_blank">{place}</a></div>'


def curve(rewards: Sequence[tuple[int, float]]) -> str:
    """The reward by step, (step, reward) in order, as a small SVG; 0 to 1 unless it leaves that."""
    width, height = SIZE
    low = min(0.0, *(reward for _, reward in rewards))
    high = max(1.0, *(reward for _, reward in rewards))
    first, last = rewards[0][0], rewards[-1][0]
    points = " ".join(
        f"{(step - first) / max(last - first, 1) * width:.1f},"
        f"{(high - reward) / (high - low) * height:.1f}"
        for step, reward in rewards
    )
    label = f"reward of steps {first} to {last}: {rewards[0][1]:.3f} to {rewards[-1][1]:.3f}"
    return (
        f'<svg viewBox="-2 -2 {width + 4} {height + 4}" width="{width}" height="{height}"'
        f' role="img" aria-label="{label}"><title>{label}</title><rect width="{width}"'
        f' height="{height}" fill="none" stroke="currentColor" stroke-opacity=".25"/><polyline'
        f' points="{points}" fill="none" stroke="#0969da" stroke-width="2"/></svg>'
    )
