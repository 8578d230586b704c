"""DebFlow: search for the program that answers every task, by edits of one program at a time, which
helpers debate. No weight moves.

accelerate launch recipes/debflow.py [--config recipes/debflow.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.workflow_search.debflow import DebFlowTrainer


def main() -> None:
    launch(DebFlowTrainer, __file__)


if __name__ == "__main__":
    run(main)
