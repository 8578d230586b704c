"""FlowReasoner: a designer learns to write a workflow for each task, first from its own rounds of
trial, then from what its programs earn.

accelerate launch recipes/flowreasoner.py [--config recipes/flowreasoner.yaml] [--field value]
HumanEval on a GPU:
accelerate launch recipes/flowreasoner.py --config recipes/flowreasoner_humaneval.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.flowreasoner import FlowReasonerTrainer


def main() -> None:
    launch(FlowReasonerTrainer, __file__)


if __name__ == "__main__":
    run(main)
