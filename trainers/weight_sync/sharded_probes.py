"""Log-probs of probes on a base that is split over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...agents.types import from_json, to_json
from .probes import ScoredWindow, trainer_logprobs

if TYPE_CHECKING:
    from ..loop.run import Run

PROBE = "the trainer's log-probs of a proof"


def join_probes(run: Run) -> None:
    """Every rank is ready to compute a proof's log-probs when rank 0 asks, see
    `probed_together`."""

    def compute(base: str, found: list[dict[str, Any]], *how: Any) -> list[float]:
        return trainer_logprobs(
            run.bases[base].adapters, [from_json(ScoredWindow, one) for one in found], *how
        )

    run.ranks.joined[PROBE] = compute


def probed_together(run: Run, base: str) -> Any:
    """`trainer_logprobs` of a base of this run (rank 0 only), with the other ranks taking part."""

    def forward(found: Any, *how: Any) -> list[float]:
        return run.ranks.together(PROBE, base, to_json(list(found)), *how)

    return forward
