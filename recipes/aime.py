"""AIME: several judges say what is wrong with a team's outputs, each by a criterion of its own, and
the team's prompts are rewritten by all of it. No weight moves.

accelerate launch recipes/aime.py [--config recipes/aime.yaml] [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.aime import AIMETrainer


def main() -> None:
    launch(AIMETrainer, __file__)


if __name__ == "__main__":
    run(main)
