"""Semantic backpropagation: every agent's prompt is rewritten by feedback that flows backward over
the graphs of errors, all that a turn read in view. No weight moves.

accelerate launch recipes/semantic_backprop.py [--config recipes/semantic_backprop.yaml]
    [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.semantic_backprop import SemanticBackpropTrainer


def main() -> None:
    launch(SemanticBackpropTrainer, __file__)


if __name__ == "__main__":
    run(main)
