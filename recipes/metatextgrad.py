"""metaTextGrad: the prompts of an optimizer that rewrites a team's prompts are optimized, by what
it makes of the team in inner runs. No weight moves.

accelerate launch recipes/metatextgrad.py [--config recipes/metatextgrad.yaml] [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.metatextgrad import MetaTextGradTrainer


def main() -> None:
    launch(MetaTextGradTrainer, __file__)


if __name__ == "__main__":
    run(main)
