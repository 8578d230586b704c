"""ADAS: search for the program that answers every task, by inventing programs beside an archive of
them; a helper does. No weight moves.

accelerate launch recipes/adas.py [--config recipes/adas.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.workflow_search.adas import ADASTrainer


def main() -> None:
    launch(ADASTrainer, __file__)


if __name__ == "__main__":
    run(main)
