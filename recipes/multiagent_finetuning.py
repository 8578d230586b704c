"""Multiagent Finetuning: a debate of generators and critics teaches itself; the majority is the
label, no gold answer is read.

accelerate launch recipes/multiagent_finetuning.py \\
    [--config recipes/multiagent_finetuning.yaml] [--max_iterations 3] [--field value]

The control, one adapter for all:
accelerate launch recipes/multiagent_finetuning.py \\
    --config recipes/multiagent_finetuning_pooled.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.imitation.multiagent_finetuning import MultiagentFinetuningTrainer


def main() -> None:
    launch(MultiagentFinetuningTrainer, __file__)


if __name__ == "__main__":
    run(main)
