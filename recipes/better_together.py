"""BetterTogether: a prompt method and a weight method in turn (`p -> w -> p`), in one run; the
state that is best on validation tasks is kept.

accelerate launch recipes/better_together.py [--config recipes/better_together.yaml]
    [--strategy "w -> p"] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.better_together import BetterTogetherTrainer


def main() -> None:
    launch(BetterTogetherTrainer, __file__)


if __name__ == "__main__":
    run(main)
