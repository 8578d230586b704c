"""Log-probs of a weight verification on a base that is split over ranks: every rank takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...agents.types import from_json, to_json
from ..distributed.ranks import Ranks
from ..model.adapters import Adapters
from .probes import ScoredWindow, trainer_logprobs

PROBE = "the trainer's log-probs of a proof"


def join_probes(ranks: Ranks, adapters_of: Callable[[str], Adapters]) -> None:
    """Every rank is ready to compute a verification's log-probs when rank 0 asks, see
    `probed_together`. `adapters_of`: those on the base of this name."""

    def compute(base: str, windows: list[dict[str, Any]], *how: Any) -> list[float]:
        asked = [from_json(ScoredWindow, window) for window in windows]
        return trainer_logprobs(adapters_of(base), asked, *how)

    ranks.joined[PROBE] = compute


def probed_together(ranks: Ranks, base: str) -> Any:
    """`trainer_logprobs` of the base of this name (rank 0 only), with the other ranks taking
    part."""

    def forward(windows: Any, *how: Any) -> list[float]:
        return ranks.together(PROBE, base, to_json(list(windows)), *how)

    return forward
