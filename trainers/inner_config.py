"""Settings of a method that takes its steps inside another method's run (`Trainer.inside`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ..agents.types import SettingError, nearest
from .config import RunConfig

C = TypeVar("C", bound=RunConfig)
OUTER = ("max_steps", "output_dir", "keep", "eval_every", "save_every")  # of the whole run alone


def inner_config(cls: type[C], outer: RunConfig, where: str, own: Mapping[str, Any]) -> C:
    """The settings of a method inside a run: those that all runs have are the run's, but for steps
    and checkpoints, which are the method's defaults; the others are given.

    Args:
        where: the setting that holds `own`, for errors.
        own: settings of the method's own.

    Raises `SettingError` at one that is unknown, or of the whole run.
    """
    shared = {f.name for f in dataclasses.fields(RunConfig)}
    known = {f.name for f in dataclasses.fields(cls)} - shared
    for key in own:
        if key in shared:
            raise SettingError(f"{where}.{key}: a setting of the whole run; put it outside")
        if key not in known:
            raise SettingError(f"{where}.{key}: unknown setting; {nearest(key, known)}")
    given = {key: getattr(outer, key) for key in shared if key not in OUTER}
    return cls(**given, **own)
