"""A metric of a step: what a number in `metrics.jsonl` is, and how people are told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ANY = "*"  # stands in a name for a policy, an agent, or another name that a run chooses
Group = Literal["learning", "health", "cost"]
Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Metric:
    """A number in a row of `metrics.jsonl`.

    Args:
        name: keys that lead to it, joined by `/`; `*` stands for a name that the run chooses:
            `policies/*/loss`.
        title: what it is called in charts, tables and on the terminal.
        unit: "share" (from 0 to 1), "nat", "tokens", "seconds", ...; "" for a plain number.
        help: what it is, in a sentence.
        better: which way is good; "" where neither is in itself.
        group: what it answers: does it learn, is it healthy, where did time and tokens go.
        detail: is it for developers? Then the report folds it away.
        trl: TRL's name for the same, "" if it has none.
        rounding: values of at most this size are rounding, and as good as 0.
    """

    name: str
    title: str
    unit: str
    help: str
    better: Better = ""
    group: Group = "health"
    detail: bool = False
    trl: str = ""
    rounding: float = 0.0

    @property
    def key(self) -> str:
        """The last part of its name."""
        return self.name.rpartition("/")[2]

    @property
    def note(self) -> str:
        """Its help with unit and direction, as one line."""
        said = f"share {self.help}" if self.unit == "share" else self.help
        if self.unit not in ("", "share") and self.unit not in said:
            said += f" ({self.unit})"
        return f"{said}; {self.better} is better" if self.better else said

    def fits(self, path: Sequence[str]) -> bool:
        """Whether these keys lead to it."""
        parts = self.name.split("/")
        return len(parts) == len(path) and all(
            part in (ANY, key) for part, key in zip(parts, path, strict=True)
        )


def find(metrics: Iterable[Metric], path: Sequence[str]) -> Metric | None:
    """The first metric that these keys lead to; None if none of them is."""
    return next((metric for metric in metrics if metric.fits(path)), None)


def words(path: Iterable[str]) -> str:
    """The title of a number that has none: its keys as words."""
    return " ".join(path).replace("_", " ")


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row of an earlier version under today's names: `names` of keys by their earlier ones, at
    any depth."""
    return {
        names.get(key, key): renamed(value, names) if isinstance(value, Mapping) else value
        for key, value in row.items()
    }
