"""Train a designer of workflow programs by their scores: write, run several times, draw pairs,
Score-DPO, publish, verify.

accelerate launch recipes/scoreflow.py [--config recipes/scoreflow.yaml] [--field value]

The controls (dpo, sft, grpo); one on the programs of another run; a real model on a GPU:
python -m marlora.recipes.scoreflow --objective dpo
python -m marlora.recipes.scoreflow --episodes runs/scoreflow --objective sft
accelerate launch recipes/scoreflow.py --config recipes/scoreflow_gsm8k.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.preference.scoreflow import ScoreFlowTrainer


def main() -> None:
    launch(ScoreFlowTrainer, __file__)


if __name__ == "__main__":
    run(main)
