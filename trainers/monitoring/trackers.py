"""Trackers beside `metrics.jsonl`: Accelerate's own, by name (`report_to: [tensorboard, wandb,
trackio, mlflow]`).

Rank 0 logs every number of a step's row under its path (`policies/solver/loss`), and every
evaluation; what each number is stands in TensorBoard's tab of texts, elsewhere in the
configuration (`help/policies/NAME/loss`). What a tracker writes to disk goes to `tracking/` in the
run folder; where the others send it is their own configuration (environment variables, login).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...rollouts.report.metrics.metric import ANY
from ...rollouts.report.metrics.names import SHARED_METRICS

PROJECT = "marlora"


class Trackers:
    """Open trackers of one run. `config`: its settings, logged once."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self.open: list[Any] = []
        if not names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = (
                kind(PROJECT, str(folder / "tracking"))
                if kind.requires_logging_directory
                else kind(PROJECT)
            )
            tracker.start()
            self.open.append(tracker)
            settings = dict(plain(config))
            if name == "tensorboard":
                tracker.store_init_configuration(settings)
                tracker.log({"metrics": help_table()}, step=0)
            else:
                tracker.store_init_configuration({**settings, **help_texts()})

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Every number of a row, under its path."""
        values = dict(numbers(row))
        for tracker in self.open:
            tracker.log(values, step=step)

    def close(self) -> None:
        for tracker in self.open:
            tracker.finish()
        self.open = []


def help_texts() -> dict[str, str]:
    """What each metric is, under `help/` and its path; `NAME` stands for a policy or such."""
    return {f"help/{metric.name.replace(ANY, 'NAME')}": metric.note for metric in SHARED_METRICS}


def help_table() -> str:
    """What each metric is, as a table in Markdown."""
    lines = ["| metric | called | what it is |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.title} | {each.note} |" for each in SHARED_METRICS]
    return "\n".join(lines)


def numbers(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of a nested mapping; what is no finite number, and the step, are left out."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{key}/")
        elif (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and before + key != "step"
        ):
            yield f"{before}{key}", float(value)


def plain(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of settings as trackers take them: numbers, flags and texts."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from plain(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", value if isinstance(value, (bool, int, float)) else str(value)
