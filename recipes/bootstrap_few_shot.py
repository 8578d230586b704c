"""DSPy's few-shot bootstrapping: successful turns become demonstrations of the agents; of several
sets of them the best on validation tasks is kept. No weight moves.

accelerate launch recipes/bootstrap_few_shot.py [--config recipes/bootstrap_few_shot.yaml]
    [--field value]

The demo's team and task on SmolLM2-135M:
accelerate launch recipes/bootstrap_few_shot.py \\
    --config recipes/bootstrap_few_shot_arithmetic.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_few_shot import (
    BootstrapFewShotTrainer,
)


def main() -> None:
    launch(BootstrapFewShotTrainer, __file__)


if __name__ == "__main__":
    run(main)
