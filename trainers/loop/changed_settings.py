"""Settings that a resumed run has changed: listed with old and new values, or refused where what
the run has done so far would not fit.

Whatever else changes is safe: stored episodes and evaluations of other settings are not taken for
those of the new ones (`collection/identified_episodes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...agents.text.secrecy import MAY_HOLD_KEYS
from ...agents.types import SettingError

# the run's beginning, its validation tasks and its bases follow from these
FIXED = ("model", "seed", "system", "num_val_tasks", "init", "values")
OF_ONE_CALL = ("resume", "overwrite", "dry_run", "serve_only", "output_dir")
MISSING = object()


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings that the run in this folder was last started with; {} where there are none."""
    import yaml

    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(
            f"{path}: cannot be read ({error}); it says what the run was started with, restore it"
        ) from error
    return settings if isinstance(settings, dict) else {}


def changed(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """{setting: (old, new)} of what differs, by the path of the setting. Settings that the old ones
    do not know (of an earlier version) are no change."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name, MISSING), new.get(name, MISSING)
        where = f"{path}.{name}" if path else str(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found |= changed(was, now, where)
        elif was != now and (path or (was is not MISSING and now is not MISSING)):
            found[where] = (was, now)
    return found


def describe(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for every setting that was changed. Raises `SettingError` for one that must not be."""
    lines = []
    for where, (was, now) in changed(old, new).items():
        top = where.partition(".")[0]
        if top in OF_ONE_CALL:
            continue
        line = f"{where}: {_shown(top, was)} -> {_shown(top, now)}"
        if top in FIXED:
            raise SettingError(
                f"resume: {line}; this may not change within a run. Give {top} as it was, or start"
                f" another run (with init: CHECKPOINT it may begin with what this one has learnt)"
            )
        lines.append(line)
    return lines


def _shown(setting: str, value: Any) -> str:
    if value is MISSING:
        return "(none)"
    if setting in MAY_HOLD_KEYS:
        return "(not shown, because it may be a key)"
    return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
