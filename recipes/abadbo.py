"""A-BAD-BO: how far each agent is trained on its own turns, by Bayesian optimisation over target
losses. Needs the extra `bayes`: pip install 'marlora[bayes]'

accelerate launch recipes/abadbo.py [--config recipes/abadbo.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.selection.abadbo import ABADBOTrainer


def main() -> None:
    launch(ABADBOTrainer, __file__)


if __name__ == "__main__":
    run(main)
