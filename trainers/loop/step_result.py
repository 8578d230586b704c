"""What a method hands to the run: the result of a step, and updates that are only tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.state import TeamState
from ...rollouts.types import Episode


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on every rank.

    Args:
        metrics: of the step's row in `metrics.jsonl`.
        episodes: those that were learnt from, on which what is published is verified.
        state: its values are in force from now on; None leaves the values as they are. Adapters
            move by updates alone.
        done: why the run ends with this step ("" goes on); a resumed run remembers it.
    """

    metrics: Mapping[str, Any]
    episodes: Sequence[Episode] = ()
    state: TeamState | None = None
    done: str = ""


@dataclass
class Trial:
    """Updates that are undone unless they are adopted, see `TrainingRun.trial`.

    `serve`: let the engines answer with what the learner holds now; until then `run.state` is that
    of before.
    """

    serve: Callable[[], None]
    adopted: bool = False

    def adopt(self) -> None:
        """Keep what was learnt inside."""
        self.adopted = True
