"""DSPy's fine-tuning by bootstrapping: every agent imitates its turns of a teacher's successful
runs; the teacher is the team itself, or differs from it by `teacher`.

accelerate launch recipes/bootstrap_finetune.py [--config recipes/bootstrap_finetune.yaml]
    [--field value]

From the demonstrations that bootstrap_few_shot found, into weights that need none:
accelerate launch recipes/bootstrap_finetune.py --teacher '{}' --exclude_demos true \\
    --init runs/bootstrap_few_shot/checkpoints/step-000007
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_finetune import (
    BootstrapFinetuneTrainer,
)


def main() -> None:
    launch(BootstrapFinetuneTrainer, __file__)


if __name__ == "__main__":
    run(main)
