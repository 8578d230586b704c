"""Several runs side by side: accuracy, curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .charts import chart
from .curves import banded
from .html import legend, number, section, table, text
from .run_data import RunData
from .tables import accuracy_with_interval, colours, difference_with_interval

HEAD = (
    "run",
    "recipe",
    "before",
    "after",
    "paired difference",
    "steps",
    "tokens sampled",
    "tokens spent on learning",
    "seconds",
)


def comparison(runs: Sequence[RunData]) -> str:
    """A row for each run, their curves in one chart, and their differing settings."""
    colour = colours([run.name for run in runs])
    rows = [_row(run, n, colour[run.name]) for n, run in enumerate(runs)]
    return section(
        "Runs compared",
        table(HEAD, rows)
        + f'<div class="grid top">{_curves(runs, colour)}</div>'
        + _differing_settings(runs),
        name="compare",
    )


def _row(run: RunData, n: int, colour: str) -> tuple[str, ...]:
    result, summary = run.summary.get("eval") or {}, run.summary
    accuracies = [
        accuracy_with_interval(entry) if entry else "–"
        for entry in (result.get("before"), result.get("after"))
    ]
    paired = result.get("paired")
    return (
        f'<a class="{colour}" href="#run-{n}">{text(run.name)}</a>',
        text(run.title),
        *accuracies,
        difference_with_interval(paired) if paired else "–",
        number(summary.get("steps")),
        number((summary.get("tokens") or {}).get("sampled")),
        number(((summary.get("budget") or {}).get("spent") or {}).get("tokens")),
        number(round((summary.get("seconds") or {}).get("total", 0))),
    )


def _measured(runs: Sequence[RunData]) -> str:
    """What the runs' evaluations measure, all of the names if they differ."""
    return ", ".join(dict.fromkeys(run.summary.get("measured", "accuracy") for run in runs))


def _curves(runs: Sequence[RunData], colour: Mapping[str, str]) -> str:
    evals = {run.name: banded(run.eval_points()) for run in runs}
    rewards = {run.name: banded(run.reward_points()) for run in runs}
    return (
        legend(colour)
        + chart(f"held-out {_measured(runs)}", "95 % interval", evals, colour)
        + chart("reward", "training, 95 % interval", rewards, colour)
    )


def _differing_settings(runs: Sequence[RunData]) -> str:
    keys = dict.fromkeys(
        k
        for run in runs
        for k in run.config
        if any(k not in r.config or r.config[k] != run.config[k] for r in runs)
    )
    if not keys:
        return ""
    rows = [
        (f"<code>{text(key)}</code>", *(text(run.config.get(key, "–"), 120) for run in runs))
        for key in keys
    ]
    settings = table(("setting", *(text(run.name) for run in runs)), rows)
    return f"<details><summary>{len(rows)} settings differ</summary>{settings}</details>"
