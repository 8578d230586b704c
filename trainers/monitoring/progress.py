"""Progress display of a run: bars on a terminal, one line per step in a log: reward with its trend,
tokens spent and time left; what developers read (loss, KL, gradient norm, tokens per second, live
proof) if it is verbose."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ...rollouts.report.metrics.names import CONSTANT_GROUPS, title_of
from ...rollouts.types import Episode


class Progress:
    """Silent on ranks other than 0. Everything goes to stderr, so a recipe's table on stdout stays
    clean.

    Args:
        show: whether anything is shown at all.
        verbose: whether a step's line has the numbers for developers.
    """

    def __init__(self, show: bool = True, verbose: bool = False) -> None:
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        self.live = show and sys.stderr.isatty()
        self._bars: Bars | None = None
        self._steps: TaskID | None = None
        self.verbose = verbose
        self._total = 0
        self._earned: list[float] = []  # of the steps so far
        self._ended: list[float] = []  # when the loop began and each step ended, in seconds
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

    def go_on(self, rewards: Iterable[float]) -> None:
        """The trend goes on from the rewards of these steps, of a run that is resumed."""
        self._earned = list(rewards)

    def start(self, done: int, total: int) -> None:
        self._total = total
        self._ended = [time.perf_counter()]
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
        reward = row.get("reward")
        if reward is not None:
            self._earned.append(float(reward))
        self._ended.append(time.perf_counter())
        parts = [
            f"step {step}/{self._total}",
            "reward -" if reward is None else f"reward {reward:.3f} {trend(self._earned)}".strip(),
            *_troubles(row),
            *(_details(row) if self.verbose else ()),
        ]
        if (spent := row.get("budget")) and spent.get("tokens"):
            money = f" ({spent['cost']:.4g} of cost)" if spent.get("cost") else ""
            parts.append(f"{spent['tokens']:,} tokens spent{money}")
        if left := time_left(self._ended, self._total - step):
            parts.append(f"{left} left")
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


# the parts of a step's line

WINDOW = 5  # steps whose mean reward is compared with that of as many before


def trend(rewards: Sequence[float]) -> str:
    """Where the reward goes: the mean of the last steps, at most `WINDOW`, less that of as many
    before them; an arrow to the side where the difference is within its standard error."""
    count = min(WINDOW, len(rewards) // 2)
    if count == 0:
        return ""
    before, last = rewards[-2 * count : -count], rewards[-count:]
    change = statistics.fmean(last) - statistics.fmean(before)
    spread = sum(statistics.variance(part) for part in (before, last)) if count > 1 else 0.0
    small = abs(change) <= math.sqrt(spread / count)
    arrow = "→" if small else "↑" if change > 0 else "↓"
    return f"{arrow} {change:+.3f} in {2 * count} steps"


def time_left(ends: Sequence[float], steps: int) -> str:
    """How long so many steps will take, by the median of the last ones; "" if none is left or none
    is done."""
    seconds = [later - end for end, later in zip(ends, ends[1:], strict=False)][-2 * WINDOW :]
    return duration(statistics.median(seconds) * steps) if seconds and steps > 0 else ""


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `2 h 5 min`, `3 d 4 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    return (
        f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
    )


def _troubles(row: Mapping[str, Any]) -> Iterator[str]:
    """The policies that a step could not train, and why; and what became of its episodes."""
    for policy, stats in (row.get("policies") or {}).items():
        if not stats.get("tokens"):
            constant = stats.get(CONSTANT_GROUPS)
            why = f" ({title_of(CONSTANT_GROUPS)} {constant:.2f})" if constant else ""
            yield f"{policy}: nothing trained{why}"
        elif not stats.get("applied", True):
            yield f"{policy}: not finite, no update"
    if row.get("failed"):
        yield f"{row['failed']} of {row['episodes']} episodes failed"


def _details(row: Mapping[str, Any]) -> Iterator[str]:
    """Numbers for developers."""
    for policy, stats in (row.get("policies") or {}).items():
        if not stats.get("tokens") or not stats.get("applied", True):
            continue
        kl = (
            f" kl {stats['mismatch_kl']:.1e}" if "mismatch_kl" in stats else ""
        )  # imitation does not compare with the engine
        value = f" value loss {stats['value_loss']:.3f}" if "value_loss" in stats else ""
        yield f"{policy}: loss {stats['loss']:+.4f}{kl} grad {stats['grad_norm']:.2f}{value}"
    yield f"{row.get('tokens_per_s', 0):.0f} tok/s"
    proof = row.get("proof") or {}
    if proof:
        yield "proof " + " ".join(
            f"{p}:{r['status']}" + (f"({r['residual']:.2f})" if r["residual"] is not None else "")
            for p, r in proof.items()
        )
