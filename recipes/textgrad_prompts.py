"""TextGrad: a team's prompts are rewritten by feedback in words that flows backward through its
runs. No weight moves.

accelerate launch recipes/textgrad_prompts.py [--config recipes/textgrad_prompts.yaml]
    [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.textgrad import TextGradTrainer


def main() -> None:
    launch(TextGradTrainer, __file__)


if __name__ == "__main__":
    run(main)
