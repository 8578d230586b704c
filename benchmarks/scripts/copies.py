"""The control "best of n copies": a search whose proposals are copies of the first program, each
measured anew, of which the best by validation is kept. What it gains is luck of measurement.

A recipe for arms of `benchmarks/compare/tiny_search.yaml`; a copy differs in a comment alone, and
with `greedy_validation: false` in what its executors sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from marlora.agents.programs.program import PROGRAM
from marlora.agents.settings import setting
from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.config import RunConfig
from marlora.trainers.methods.workflow_search.measurement import MeasurementConfig
from marlora.trainers.methods.workflow_search.proposals import Proposal
from marlora.trainers.methods.workflow_search.workflow_search import (
    WorkflowSearchConfig,
    WorkflowSearchTrainer,
)
from marlora.trainers.values.search import Candidate


@dataclass
class CopiesConfig(WorkflowSearchConfig, MeasurementConfig, RunConfig):
    """`RunConfig` with a search that proposes nothing new."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/copies"
    )


class CopiesTrainer(WorkflowSearchTrainer[CopiesConfig]):
    """Measures copies of the first program. Arguments: see `Trainer`."""

    Config = CopiesConfig

    def helper_names(self) -> Sequence[str]:
        return ()

    def propose(self, step: int) -> Candidate | None:
        """The first program again."""
        first = self.search.candidates[0]
        text = f"{first.values[PROGRAM]}  # copy {step}"
        copy = self.enter(Proposal(f"copy {step}", text, proposer="copy"), [first], step)
        return None if copy is None else self.measure(copy)


def main() -> None:
    launch(CopiesTrainer, __file__)


if __name__ == "__main__":
    run(main)
