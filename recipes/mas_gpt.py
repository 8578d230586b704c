"""MAS-GPT: train a designer that writes a whole multi-agent system for each query, on the systems
of a pool that answered similar queries.

accelerate launch recipes/mas_gpt.py [--config recipes/mas_gpt.yaml] [--field value]

The paper's ablation; a real model on a GPU, with a helper that fits each system to its query:
python -m marlora.recipes.mas_gpt --assign random --output_dir runs/mas_gpt_random
accelerate launch recipes/mas_gpt.py --config recipes/mas_gpt_gsm8k.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.imitation.mas_gpt.mas_gpt import MASGPTTrainer


def main() -> None:
    launch(MASGPTTrainer, __file__)


if __name__ == "__main__":
    run(main)
