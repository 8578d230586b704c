"""AutoFlow: a designer learns to write one workflow in words for all tasks of a kind, by policy
gradient, or is asked for better ones in a chat.

accelerate launch recipes/autoflow.py [--config recipes/autoflow.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.autoflow import AutoFlowTrainer


def main() -> None:
    launch(AutoFlowTrainer, __file__)


if __name__ == "__main__":
    run(main)
