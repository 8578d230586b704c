"""AFlow: search for the program that answers every task, by edits of one program at a time, which
a helper proposes. No weight moves.

accelerate launch recipes/aflow.py [--config recipes/aflow.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.workflow_search.aflow import AFlowTrainer


def main() -> None:
    launch(AFlowTrainer, __file__)


if __name__ == "__main__":
    run(main)
