"""Values over time: what a run's team was given at each step, from the states that its episodes
played with and from its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoints.reader import ORIGIN, VALUES
from ...episodes.store import Store
from ..run_data import RunData, read_json

FIELDS = ("prompt", "demos", "policy")  # of an agent's settings that are values too: NAME.prompt
MAX_WORD = 40  # characters of a choice; a longer text is shown as a text


@dataclass(frozen=True)
class ValueHistory:
    """The values in force after each step whose state is on record, beginning with step 0; by name
    what holds where no value is set, as far as the settings of the agents tell."""

    points: Sequence[tuple[int, Mapping[str, Any]]]
    defaults: Mapping[str, Any]

    @classmethod
    def read(cls, run: RunData) -> ValueHistory:
        """Read it from the folder of a run. Raises `StoreError` for a state that was altered."""
        points = []
        if (first := _first_values(run)) is not None:
            points.append((0, first))
        for row in run.metrics:
            found = _values_of(run.folder, row["step"], row.get("state"))
            if found is not None:
                points.append((row["step"], found))
        return cls(points, _defaults(run.config))

    @property
    def names(self) -> list[str]:
        """Names of all values that were ever set."""
        return sorted({name for _, values in self.points for name in values})

    def of(self, name: str) -> list[tuple[int, Any]]:
        """(step, value) of every point; None where nothing is set and no default is known."""
        return [(step, values.get(name, self.defaults.get(name))) for step, values in self.points]

    def changes(self, name: str) -> list[tuple[int, Any]]:
        """The value at the first point, and at every point where it is another than before."""
        kept: list[tuple[int, Any]] = []
        for step, value in self.of(name):
            if not kept or kept[-1][1] != value:
                kept.append((step, value))
        return kept


def trials_of(run: RunData) -> list[tuple[str, Mapping[str, Any]]]:
    """The trials of a run: how the ids of those of one state begin, and the values they had."""
    begins: dict[str, str] = {}
    for row in run.episodes:
        if row.kind == "trial" and not row.child:
            begins.setdefault(row.state, row.group.partition("/")[0] + "/")
    found = ((begin, _values_of(run.folder, -1, key)) for key, begin in begins.items())
    return [(begin, values) for begin, values in found if values is not None]


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of the newest checkpoint; None if there is none."""
    systems = sorted(run.glob("checkpoints/step-*/system.json"))
    return systems[-1].parent if systems else None


def _first_values(run: RunData) -> Mapping[str, Any] | None:
    """The values at step 0: those that a checkpoint says the run began with, else those of its
    first episode."""
    checkpoint = newest_checkpoint(run.folder)
    origin = read_json(checkpoint / "values" / ORIGIN) if checkpoint else None
    if origin is not None:
        return dict(origin)
    keys = (row.state for row in run.episodes if row.step <= 1 and row.kind in ("eval", "train"))
    return _values_of(run.folder, 0, next(keys, None))


def _values_of(run: Path, step: int, key: Any) -> Mapping[str, Any] | None:
    """The values of a state by its key, which is on record if episodes played with it, or if a
    checkpoint of this step was kept; else None."""
    if not key:
        return None
    store = Store(run / "episodes")
    if (store.folder / "values" / f"{key}.json").is_file():
        return store.state(key).values
    kept = read_json(run / "checkpoints" / f"step-{step:06d}" / "values" / VALUES)
    return None if kept is None else dict(kept)


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for agent, fields in (config.get("agents") or {}).items():
        for name in FIELDS:
            if isinstance(fields, Mapping) and name in fields:
                found[f"{agent}.{name}"] = fields[name]
    return found


# what a value looks like


def is_choice(name: str, values: Sequence[Any]) -> bool:
    """Is this value one of a few words, such as the policy that an agent speaks with?"""
    if name.endswith((".prompt", ".demos")):
        return False
    given = [value for value in values if value is not None]
    return bool(given) and all(
        isinstance(v, bool) or (isinstance(v, str) and len(v) <= MAX_WORD and len(v.split()) <= 1)
        for v in given
    )


def is_numeric(values: Sequence[Any]) -> bool:
    """Is this value a number?"""
    given = [value for value in values if value is not None]
    return bool(given) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in given
    )


def as_logits(value: Any) -> dict[str, dict[str, float]] | None:
    """A table of logits, {decision: {option: logit}}; that of one decision under the name "". None
    for a value that is no logits."""
    if not isinstance(value, Mapping) or not value:
        return None
    rows = value if all(isinstance(row, Mapping) for row in value.values()) else {"": value}
    for row in rows.values():
        if not row or not is_numeric(list(row.values())):
            return None
    return {str(name): dict(row) for name, row in rows.items()}


def as_text(value: Any) -> str:
    """A value as text: demonstrations as a chat, what is no text as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and all(
        isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in value
    ):
        return "\n".join(f"{each['role']}: {each['content']}" for each in value)
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
