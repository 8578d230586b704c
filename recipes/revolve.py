"""REVOLVE: a team's prompts are rewritten by feedback in words and by how they have evolved. No
weight moves.

accelerate launch recipes/revolve.py [--config recipes/revolve.yaml] [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.revolve import RevolveTrainer


def main() -> None:
    launch(RevolveTrainer, __file__)


if __name__ == "__main__":
    run(main)
