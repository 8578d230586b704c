"""The metrics row of a step: rewards, lengths and shares of its episodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...rollouts.types import Episode
from ..errors import RunError


def unscorable(episode: Episode) -> bool:
    """It failed, or a reward of it is NaN."""
    return episode.error is not None or any(math.isnan(r.value) for r in episode.rewards)


def collection_row(
    step: int, episodes: Sequence[Episode], metric: str, warn: Callable[[str], None], seconds: float
) -> dict[str, Any]:
    """What a step's row in `metrics.jsonl` says of its episodes, which took so long. Raises
    `RunError` if there is nothing to learn from."""
    parents = [e for e in episodes if e.parent is None]
    if all(e.error for e in parents):
        raise RunError(f"step {step}: every episode failed; the first one: {parents[0].error}")
    if all(unscorable(e) for e in parents):
        why = next(r.text for e in parents for r in e.rewards if math.isnan(r.value))
        raise RunError(
            f"step {step}: no episode could be scored; the first one: {why}; mend it and go on with"
            " resume"
        )
    lost = [e for e in parents if unscorable(e)]
    if lost:
        why = lost[0].error or next(r.text for r in lost[0].rewards if math.isnan(r.value))
        warn(
            f"step {step}: {len(lost)} of {len(parents)} episodes failed or have no score; the"
            f" first: {why}"
        )
    sampled = sum(u.sampled_tokens for e in episodes for u in e.usage.values())
    values = [v for e in parents if not math.isnan(v := e.reward(metric))]
    return {
        "step": step,
        "reward": sum(values) / len(values) if values else None,
        "reward_min": min(values, default=None),
        "reward_max": max(values, default=None),
        "episodes": len(parents),
        "failed": sum(e.failed for e in parents),
        "unscorable": len(parents) - len(values),
        "sampled_tokens": sampled,
        "tokens_per_s": sampled / max(seconds, 1e-9),
    }
