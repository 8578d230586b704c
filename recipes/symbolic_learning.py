"""Symbolic learning: the prompts, states and edges of a pipeline are edited in turn, by feedback
that flows back along its runs. No weight moves.

accelerate launch recipes/symbolic_learning.py [--config recipes/symbolic_learning.yaml]
    [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.symbolic_learning import SymbolicLearningTrainer


def main() -> None:
    launch(SymbolicLearningTrainer, __file__)


if __name__ == "__main__":
    run(main)
