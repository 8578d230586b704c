"""Progress display of a run: bars with reward, tokens/s, KL and proof on a terminal, one
line per step in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from ...rollouts.files import append_text
from ...rollouts.types import Episode


class Progress:
    """Silent on ranks other than 0. Everything goes to stderr, so a recipe's table on stdout stays
    clean."""

    def __init__(self, show: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.live = show and sys.stderr.isatty()
        self._bars: Bars | None = None
        self._steps: TaskID | None = None
        self._total = 0
        self._kept: Path | None = None

    def keep_warnings(self, path: Path) -> None:
        """Append warnings to this file too, from now on; the report shows them."""
        self._kept = path

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)
        if self._kept is not None:
            try:
                append_text(self._kept, " ".join(text.split()) + "\n")
            except (
                OSError
            ) as error:  # a warning that cannot be kept has been shown, and ends no run
                self._kept = None
                self.console.print(
                    f"warnings are shown only, no longer kept: {error}",
                    style="yellow",
                    markup=False,
                )

    def start(self, done: int, total: int) -> None:
        self._total = total
        bars = self._opened()
        if bars is not None and self._steps is None and total:  # an evaluation has no steps
            self._steps = bars.add_task("steps", total=total, completed=done, note="")

    def _opened(self) -> Bars | None:
        """The bars, started; None where no terminal shows them."""
        if self.live and self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Bars(
                *columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True
            )
            self._bars.start()
        return self._bars if self.live else None

    @contextlib.contextmanager
    def episodes(
        self, what: str, total: int, done: int, metric: str
    ) -> Iterator[Callable[[Episode], None]]:
        """A bar over episodes; the yielded function counts one and shows the mean of `metric` and
        tokens/s so far."""
        seen: list[float] = []
        tokens, start = [0], time.perf_counter()
        bars = self._opened()
        bar = bars.add_task(what, total=total, completed=done, note="") if bars else None

        def tick(episode: Episode) -> None:
            tokens[0] += sum(u.sampled_tokens for u in episode.usage.values())
            if episode.parent is None and not math.isnan(value := episode.reward(metric)):
                seen.append(value)
            if bar is not None and self._bars and episode.parent is None:
                mean = f"{metric} {sum(seen) / len(seen):.3f}" if seen else ""
                note = f"{mean}  {tokens[0] / max(time.perf_counter() - start, 1e-9):.0f} tok/s"
                self._bars.update(bar, advance=1, note=note)

        try:
            yield tick
        finally:
            if bar is not None and self._bars:
                self._bars.remove_task(bar)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """One finished step: the numbers people care about."""
        parts = [
            f"step {step}/{self._total}",
            f"reward {row['reward']:.3f}" if row.get("reward") is not None else "reward -",
        ]
        for policy, stats in (row.get("policies") or {}).items():
            if not stats.get("tokens"):
                parts.append(f"{policy}: no signal")
                continue
            if not stats.get("applied", True):
                parts.append(f"{policy}: not finite, no update")
                continue
            kl = (
                f" kl {stats['mismatch_kl']:.1e}" if "mismatch_kl" in stats else ""
            )  # imitation does not compare with the engine
            value = f" value loss {stats['value_loss']:.3f}" if "value_loss" in stats else ""
            parts.append(
                f"{policy}: loss {stats['loss']:+.4f}{kl} grad {stats['grad_norm']:.2f}{value}"
            )
        parts.append(f"{row.get('tokens_per_s', 0):.0f} tok/s")
        if (spent := row.get("budget")) and spent.get("tokens"):
            money = f" ({spent['cost']:.4g} of cost)" if spent.get("cost") else ""
            parts.append(f"{spent['tokens']:,} tokens spent{money}")
        proof = row.get("proof") or {}
        if proof:
            parts.append(
                "proof "
                + " ".join(
                    f"{p}:{r['status']}"
                    + (f"({r['residual']:.2f})" if r["residual"] is not None else "")
                    for p, r in proof.items()
                )
            )
        self.say(" | ".join(parts))
        if self._bars and self._steps is not None:
            self._bars.update(self._steps, completed=step, note="")

    def sample(self, policy: str, pieces: Sequence[tuple[str, bool]]) -> None:
        """A sample as it is trained: what the agent read is dim, what it learns from is green and
        underlined."""
        text = Text(
            f"first batch of {policy!r} (trained tokens between the marks):\n", style="bold"
        )
        for piece, trained in pieces:
            text.append(
                f"\u2038{piece}\u2038" if trained else piece,
                style="green underline" if trained else "dim",
            )
        self.console.print(text)

    def close(self) -> None:
        if self._bars:
            self._bars.stop()
            self._bars = self._steps = None
