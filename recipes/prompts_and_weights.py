"""Prompts and weights from one store: the episodes that train the adapters by GRPO also rank the
prompts that they were played under; a helper writes new prompts from them.

accelerate launch recipes/prompts_and_weights.py [--config recipes/prompts_and_weights.yaml]
    [--num_candidates 1] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.prompts_and_weights import PromptsAndWeightsTrainer


def main() -> None:
    launch(PromptsAndWeightsTrainer, __file__)


if __name__ == "__main__":
    run(main)
