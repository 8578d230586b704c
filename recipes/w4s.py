"""W4S: a weak designer learns to write the one program that a stronger model executes for all
tasks, from how well its programs score.

accelerate launch recipes/w4s.py [--config recipes/w4s.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.imitation.w4s import W4STrainer


def main() -> None:
    launch(W4STrainer, __file__)


if __name__ == "__main__":
    run(main)
