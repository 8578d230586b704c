"""The shape of an adapter that a policy starts from (`init`): rank, alpha and target modules of a
PEFT folder. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..agents.types import SettingError
from ..rollouts.checkpoints.reader import read_checkpoint
from ..rollouts.engines.adapter_versions import FILES

SHAPE = {"r": "r", "alpha": "lora_alpha", "targets": "target_modules"}  # AdapterSpec: PEFT


def init_folder(init: str) -> Path:
    """Where the weights of `PolicySpec.init` lie: a PEFT folder, or `CHECKPOINT#POLICY`.

    A path may hold `#` itself: only a name at its end is split off, from a folder that exists.
    """
    checkpoint, _, policy = init.rpartition("#")
    names_policy = policy and "/" not in policy and checkpoint and Path(checkpoint).is_dir()
    if not names_policy or Path(init).is_dir():
        return Path(init)
    return Path(checkpoint) / "adapters" / policy


def checkpoint_policy(checkpoint: str, policy: str) -> dict[str, str]:
    """`init` of a policy where the run begins with a checkpoint's state: its adapter there, {} if
    it has learnt none."""
    entry = read_checkpoint(Path(checkpoint))["adapters"].get(policy, {})
    return {"init": f"{checkpoint}#{policy}"} if entry.get("trained") else {}


def adapter_shape(init: Any, given: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """`r`, `alpha` and `targets` as the `adapter_config.json` of `init` says them; {} for a fresh
    adapter.

    `given`: what the user has set of them, under the YAML name `setting`. Raises `SettingError`
    with both values where these differ, and for a folder that holds no adapter.
    """
    if not isinstance(init, str) or init == "fresh":
        return {}
    path = init_folder(init) / FILES[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{setting.removesuffix('adapter')}init: {init!r}: no adapter can be read there"
            f" ({error}); expected fresh, a PEFT folder, or CHECKPOINT#POLICY such as"
            " RUN/checkpoints/step-000010#solver"
        ) from error
    shape: dict[str, Any] = {}
    for field, key in SHAPE.items():
        value: Any = config.get(key) if isinstance(config, dict) else None
        if type(value) not in ((list,) if field == "targets" else (int, float)):
            continue
        shape[field] = sorted(value) if field == "targets" else value
        own = given.get(field, shape[field])
        if (sorted(own) if field == "targets" and isinstance(own, (list, tuple)) else own) != (
            shape[field]
        ):
            raise SettingError(
                f"{setting}.{field}: {own!r}, but {path} says {key} {shape[field]!r}; leave"
                f" {setting}.{field} out to start from that adapter, or set init: fresh"
            )
    return shape
